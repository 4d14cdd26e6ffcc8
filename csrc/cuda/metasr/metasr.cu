// MetaSR's folded decode on the GPU, forward and backward; csrc/metasr.h has the formula. Not yet run on a GPU.
//
// A lane owns a few hidden units, the same ones for all queries, so that every access to a latent is one whole segment.
// A warp walks 32 consecutive queries: first each lane finds the latent of one of them, then all lanes decode one query
// after the other. Values that neighboring queries have in common stay in registers: the latent (neighbors in an
// upscaled image use the same latent), and the part of `hidden` that row and cell decide (equal for all queries of an
// image row). The rest of a query takes five instructions per hidden unit. Sums over the lanes are taken for four
// queries and three outputs at a time, by one tree of shuffles instead of twelve.
//
// Backward: the weights' gradients are summed in registers, then over a block, and become one partial sum for each
// shard of the queries; a last kernel adds the shards. The shards and every order of summation depend on the problem
// alone. The latent map's gradient is summed in registers while queries stay on one latent, then added with atomics.
// Where the caller has sorted the queries by latent, each latent is written once, with its queries added in their
// order.
#include "cuda/metasr/backward_filter.cuh"
#include "cuda/metasr/backward_map.cuh"
#include "cuda/metasr/forward.cuh"

namespace liif_fast {
namespace {

// Offsets inside a latent are ints.
constexpr const char* kTooWide = "a latent of MetaSR's map holds more than 2^28 numbers";
template <class T>
bool is_too_wide(const MetasrProblem<T>& p) {
  return p.outs * (p.hidden + 1) > int64_t{1} << 28;
}

template <class T>
int64_t shard_count(const MetasrProblem<T>& p) {
  const int64_t runs = make_task(p).runs, blocks = (runs + kWarps - 1) / kWarps;
  return blocks < kMaxShards ? blocks : kMaxShards;
}

template <class T, class E>
const char* launch_filter_backward(const MetasrTask<T>& task, const E* latent_map, const MetasrGrads<T>& grads,
                                   T* workspace, void* stream) {
  const int64_t shards = shard_count(task.p);
  if (shards > 0) {
    const char* const error = launch(metasr_backward_filter_kernel<T, E>, static_cast<unsigned>(shards), stream, task,
                                     latent_map, grads, shards, workspace);
    if (error) return error;
  }
  return launch(metasr_backward_weight_kernel<T>, blocks_for(kTerms * task.hidden), stream, workspace, shards,
                task.hidden, grads.weight, grads.bias);
}

}  // namespace

template <class T>
const char* launch_metasr_forward(const MetasrProblem<T>& problem, Dtype dtype, void* stream) {
  const MetasrTask<T> task = make_task(problem);
  if (task.queries == 0) return nullptr;
  if (is_too_wide(problem)) return kTooWide;
  return with_type<T>(dtype, [&](auto element) {
    using E = decltype(element);
    const auto run = [&](auto kernel) {
      return launch(kernel, blocks_for(task.runs), stream, task, static_cast<const E*>(problem.latent_map));
    };
    if constexpr (std::is_same_v<T, float>)
      if (problem.hidden % (kUnits<T> * kWarp) == 0) return run(metasr_forward_kernel<T, E, true>);
    return run(metasr_forward_kernel<T, E, false>);
  });
}

template <class T>
int64_t metasr_workspace(const MetasrProblem<T>& problem) {
  return shard_count(problem) * kTerms * problem.hidden;
}

template <class T>
const char* launch_metasr_latents(const MetasrProblem<T>& problem, int64_t* latents, void* stream) {
  const MetasrTask<T> task = make_task(problem);
  if (task.queries == 0) return nullptr;
  return launch(metasr_latents_kernel<T>, blocks_for(task.runs), stream, task, latents);
}

template <class T>
const char* launch_metasr_backward(const MetasrProblem<T>& problem, Dtype dtype, const MetasrGrads<T>& grads,
                                   const MetasrOrder& sorted, T* workspace, void* stream) {
  const MetasrTask<T> task = make_task(problem);
  if (is_too_wide(problem)) return kTooWide;
  const char* const error = with_type<T>(dtype, [&](auto element) {
    using E = decltype(element);
    return launch_filter_backward(task, static_cast<const E*>(problem.latent_map), grads, workspace, stream);
  });
  if (error || problem.batch == 0) return error;
  if (sorted.order)
    return launch(metasr_backward_map_ordered_kernel<T>,
                  blocks_for(problem.batch * problem.region_height * problem.region_width), stream, task,
                  grads.grad_out, sorted.order, sorted.starts, grads.latent_map);
  if (task.queries == 0) return nullptr;
  return launch(metasr_backward_map_kernel<T>, blocks_for(task.runs), stream, task, grads.grad_out, grads.latent_map);
}

#define LIIF_INSTANTIATE(T)                                                                          \
  template const char* launch_metasr_forward(const MetasrProblem<T>&, Dtype, void*);                 \
  template int64_t metasr_workspace(const MetasrProblem<T>&);                                        \
  template const char* launch_metasr_latents(const MetasrProblem<T>&, int64_t*, void*);              \
  template const char* launch_metasr_backward(const MetasrProblem<T>&, Dtype, const MetasrGrads<T>&, \
                                              const MetasrOrder&, T*, void*);
LIIF_INSTANTIATE(double)
LIIF_INSTANTIATE(float)
#undef LIIF_INSTANTIATE

}  // namespace liif_fast
