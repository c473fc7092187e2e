// What the micro-kernels take: three inputs, an output, four numbers.
#pragma once

#include <ptx/launch.h>  // not "ptx/…", which would be the emulator's on a device too
#include <ptx/thread.h>

#include <cstdint>

namespace smartclip::micro {

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
