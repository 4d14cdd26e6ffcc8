// The registration of the ops at run time, under a namespace that the caller names. torch's STABLE_TORCH_LIBRARY fixes
// the namespace at compile time and ignores errors: a second copy of the extension in a process would crash it.
#pragma once

#include <torch/csrc/stable/library.h>

#include <map>
#include <string>

namespace liif_fast {

class Registry {
 public:
  // Throws std::runtime_error where the namespace is taken, as the two below do where torch refuses an op.
  explicit Registry(const char* name_space);
  ~Registry();  // removes the ops from torch
  Registry(const Registry&) = delete;
  Registry& operator=(const Registry&) = delete;

  void def(const char* schema);
  void impl(const char* dispatch_key, const char* name, void (*boxed)(StableIValue*, uint64_t, uint64_t));

 private:
  std::string name_space_;
  TorchLibraryHandle schemas_ = nullptr;
  std::map<std::string, TorchLibraryHandle> kernels_;  // by dispatch key
};

// One for each file of bindings. The CUDA bindings also define the schemas of the ops that exist for CUDA alone.
void register_cpu_gather(Registry& ops);
void register_cpu_decode(Registry& ops);
void register_cuda_gather(Registry& ops);
void register_cuda_decode(Registry& ops);
void register_cuda_metasr(Registry& ops);
void register_cuda_convolution(Registry& ops);

}  // namespace liif_fast
