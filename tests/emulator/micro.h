// What the micro-kernels take: three inputs, an output, four numbers.
#pragma once

#include <ptx/launch.h>  // not "ptx/…", which would be the emulator's on a device too
#include <ptx/thread.h>

#include <cstdint>

namespace smartclip::micro {

// A device gets no faults: its compiler, where it sees that sums are touched too early, would wait for the products.
#ifdef __CUDACC__
SK_DEVICE int fault_of(int64_t) { return 0; }
#else
SK_DEVICE int fault_of(int64_t number) { return static_cast<int>(number); }
#endif

struct Parameters {
  const void* in[3];
  void* out;
  int64_t number[4];

  template <class T>
  SK_DEVICE const T* input(int k) const {
    return static_cast<const T*>(in[k]);
  }
  template <class T>
  SK_DEVICE T* output() const {
    return static_cast<T*>(out);
  }
};

}  // namespace smartclip::micro
