// The launches of the CUDA backend as a Python class, for smartclip_kernels._C and for the tests' emulator.
#pragma once

#include "addresses.h"

namespace smartclip::cuda {

void define(py::module_& module);

}  // namespace smartclip::cuda
