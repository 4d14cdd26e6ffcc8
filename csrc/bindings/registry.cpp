#include "bindings/registry.h"

#include <stdexcept>

namespace liif_fast {
namespace {

void check(AOTITorchError code, const std::string& sentence) {
  if (code != AOTI_TORCH_SUCCESS) throw std::runtime_error(sentence);
}

}  // namespace

Registry::Registry(const char* name_space) : name_space_(name_space) {
  check(aoti_torch_library_init_def(name_space, __FILE__, __LINE__, &schemas_),
        "another copy of the extension has registered torch.ops." + name_space_ + " in this process");
}

Registry::~Registry() {
  for (const auto& [key, library] : kernels_) aoti_torch_delete_library_object(library);
  aoti_torch_delete_library_object(schemas_);
}

void Registry::def(const char* schema) {
  check(aoti_torch_library_def(schemas_, schema), std::string("torch refused the op ") + schema);
}

void Registry::impl(const char* dispatch_key, const char* name, void (*boxed)(StableIValue*, uint64_t, uint64_t)) {
  const std::string refused = "torch refused the " + std::string(dispatch_key) + " kernel of the op " + name;
  TorchLibraryHandle& library = kernels_[dispatch_key];
  if (!library) {
    const AOTITorchError code =
        aoti_torch_library_init_impl(name_space_.c_str(), dispatch_key, __FILE__, __LINE__, &library);
    if (code != AOTI_TORCH_SUCCESS) kernels_.erase(dispatch_key);
    check(code, refused);
  }
  check(torch_library_impl(library, name, boxed, TORCH_ABI_VERSION), refused);
}

}  // namespace liif_fast
