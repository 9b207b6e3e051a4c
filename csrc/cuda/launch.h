// One launcher per stage, and one each for the whole forward and backward pass of short sequences. None allocates, synchronises, prints or
// throws; the status is that of the launch.
#pragma once
#include <cuda_runtime_api.h>

#include "params.h"

namespace mita {

cudaError_t launch_pool(const PoolParams&, cudaStream_t);
bool fits_pool_route(const Problem&, const Windows&);  // with what the current device has
cudaError_t launch_pool_route(const PoolRouteParams&, cudaStream_t);  // the same landmarks and experts in one pass over the queries
bool fits_pool_route_group(const Problem&, const Windows&);
cudaError_t launch_pool_route_group(const PoolRouteGroupParams&, cudaStream_t);  // and these grouped
cudaError_t launch_pool_backward(const PoolBackwardParams&, cudaStream_t);
int score_splits(const Problem&);  // parts of the keys, with what the current device has
cudaError_t launch_landmark_scores(const LandmarkParams&, cudaStream_t);    // scores, and the softmax over parts of the keys
cudaError_t launch_landmark_combine(const LandmarkParams&, cudaStream_t);   // compressed, lse
cudaError_t launch_landmark_topk(const LandmarkParams&, cudaStream_t);      // scores -> indices
cudaError_t launch_route(const RouteParams&, cudaStream_t);
cudaError_t launch_group(const GroupParams&, cudaStream_t);
cudaError_t launch_expert_attention(const AttentionParams&, cudaStream_t);
cudaError_t launch_specialist_attention(const AttentionParams&, cudaStream_t);  // its part for sm_90a
bool fits_short_attention(const Problem&, bool shared);  // by its shape, and what the current device has
cudaError_t launch_short_attention(const ShortParams&, cudaStream_t);
bool fits_short_gradient(const Problem&, bool shared, float scale, float landmark_scale);
cudaError_t launch_short_gradient(const ShortGradientParams&, cudaStream_t);
bool fits_short_masked_gradient(const Problem&);
cudaError_t launch_short_masked_gradient(const ShortGradientParams&, cudaStream_t);  // its part by masks
bool fits_masked_gradient(const Problem&, float scale, float landmark_scale);  // and is quicker than lists
int masked_gradient_pitch(const Problem&);
cudaError_t launch_masked_row_gradient(const MaskedGradientParams&, cudaStream_t);  // masks, dq, delta
cudaError_t launch_masked_key_gradient(const MaskedGradientParams&, cudaStream_t);  // dk and dv, then
cudaError_t launch_delta(const DeltaParams&, cudaStream_t);
cudaError_t launch_unit_gradient(const UnitGradientParams&, cudaStream_t);
bool fits_unit_specialists(const UnitGradientParams&);
cudaError_t launch_unit_specialists(const UnitGradientParams&, cudaStream_t);  // its part for sm_90a
cudaError_t launch_key_lists(const KeyListParams&, cudaStream_t);
cudaError_t launch_row_gradient(const RowGradientParams&, cudaStream_t);  // with its own finish
int row_gradient_tile_rows(const Problem&, int entries_per_expert);
bool fits_small_row_gradient(const Problem&);  // by its shape, and what the current device has
cudaError_t launch_small_row_gradient(const RowGradientParams&, cudaStream_t);  // its part by warps
bool fits_small_unit_gradient(const UnitGradientParams&);
cudaError_t launch_small_unit_gradient(const UnitGradientParams&, cudaStream_t);  // the same
bool fits_row_specialists(const Problem&, RowRole);
cudaError_t launch_row_specialists(const RowGradientParams&, cudaStream_t);  // its part for sm_90a
cudaError_t launch_row_finish(const RowGradientParams&, cudaStream_t);    // gradients from partial sums
bool fits_key_specialists(const Problem&);
cudaError_t launch_key_specialists(const KeyGradientParams&, cudaStream_t);
bool fits_specialist_gradient(const Problem&, bool shared, float scale, float landmark_scale);
cudaError_t launch_specialist_gradient(const AttentionGradientParams&, cudaStream_t);
cudaError_t launch_reduce(const ReduceParams&, cudaStream_t);

}  // namespace mita
