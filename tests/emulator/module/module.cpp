// The CUDA backend's launches as a module of their own, for the emulator.
#include "cuda.h"

PYBIND11_MODULE(_emulated, module) { smartclip::cuda::define(module); }
