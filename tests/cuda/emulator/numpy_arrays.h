// Shared by the emulator's modules, which run the kernels of csrc/cuda on numpy arrays. bfloat16 values are passed as
// their bits, in numpy's uint16.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/launch.h"

namespace liif_fast {

namespace py = pybind11;
using Shape = std::vector<py::ssize_t>;

inline Dtype parse(const std::string& name) {
  if (name == "float64") return Dtype::kFloat64;
  if (name == "float32") return Dtype::kFloat32;
  if (name == "bfloat16") return Dtype::kBFloat16;
  if (name == "float16") return Dtype::kFloat16;
  throw std::invalid_argument("no dtype is called " + name);
}

// Checks the answer of a launch.
inline void check(const char* error) {
  if (error) throw std::runtime_error(error);
}

constexpr int kNaN = 0xff;  // of every byte: NaN in each of the four dtypes

// An array with every byte the same. Outputs begin as NaN, so that tests see a value that was not written.
inline py::array make(const py::dtype& dtype, const Shape& shape, int byte) {
  py::array result(dtype, shape);
  std::memset(result.mutable_data(), byte, static_cast<size_t>(result.nbytes()));
  return result;
}

template <class T>
const T* read(const py::array& array) {
  if (!(array.flags() & py::array::c_style)) throw std::invalid_argument("an array is not contiguous");
  if (!py::isinstance<py::array_t<T>>(array))
    throw std::invalid_argument("an array does not have the geometry's dtype");
  return static_cast<const T*>(array.data());
}

template <class T>
T* write(py::array& array) {
  return static_cast<T*>(array.mutable_data());
}

}  // namespace liif_fast
