"""MiTA attention inside other libraries. Each module needs its library; importing it changes nothing there."""
