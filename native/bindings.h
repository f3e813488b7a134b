// What the binding files share.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include "kernels.h"

namespace localds {

namespace nb = nanobind;

using ByteArray = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using FloatRow = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using FloatRows = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

// The Python class `Matrix`: a matrix and the buffer that it points into.
struct BoundMatrix {
  Matrix matrix;
  ByteArray buffer;
};

void bind_experts(nb::module_& m);
void bind_kernels(nb::module_& m);
void bind_ops(nb::module_& m);
void bind_profile(nb::module_& m);
void bind_sources(nb::module_& m);

// A numpy array that owns `data`, allocated with new[].
template <class T, size_t N>
nb::ndarray<nb::numpy, T> to_numpy(T* data, const size_t (&shape)[N]) {
  nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<T*>(p); });
  return nb::ndarray<nb::numpy, T>(data, N, shape, owner);
}

}  // namespace localds
