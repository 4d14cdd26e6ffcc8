// The convolution of the first layer (csrc/cuda/convolution.cu), two slices of a small map, as seeds.h runs it.
#include "cuda/convolution.cu"

#include "seeds.h"

namespace liif_fast {
namespace {

uint64_t run() {
  constexpr int64_t kHeight = 2, kWidth = 5, kChannels = 68, kOuts = 8;
  std::mt19937 generator(3);
  std::vector<float> map(kHeight * kWidth * kChannels), kernels(kOuts * kChannels * 9), out(kHeight * kWidth * kOuts);
  for (std::vector<float>* values : {&map, &kernels})
    for (float& value : *values) value = static_cast<float>(generator() % 101) - 50.0f;
  ConvolutionProblem p{};
  p.batch = 1;
  p.height = kHeight;
  p.width = kWidth;
  p.channels = kChannels;
  p.outs = kOuts;
  p.map = map.data();
  p.kernels = kernels.data();
  p.in_bfloat16 = true;
  p.out = out.data();
  std::vector<unsigned char> workspace(static_cast<size_t>(convolution_workspace(p)));
  check(launch_convolution(p, workspace.data(), nullptr));
  uint64_t hash = 14695981039346656037u;
  add_to_hash(hash, out);
  return hash;
}

}  // namespace
}  // namespace liif_fast

int main(int count, char** arguments) { return liif_fast::run_seeds(count, arguments, liif_fast::run); }
