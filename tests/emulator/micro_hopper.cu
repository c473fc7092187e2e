// Kernels for the wrappers of sm_90a, and faults that must be found. Compiled for the emulator and by nvcc for sm_90a;
// tests/test_emulator_hopper.py calls micro() of either.
#include <cstdio>

#include "micro_barriers.cuh"
#include "micro_products.cuh"

namespace smartclip::micro {
namespace {

struct Launcher {
  Parameters p;
  int64_t blocks;

  template <class P>
  void operator()(const char* name, void (*kernel)(P), int threads, size_t shared_bytes, const P& parameters) const {
    cuda::launch(name, kernel, {blocks, threads, shared_bytes}, nullptr, parameters);
  }
  Mapped mapped(int second, int64_t rows, int64_t depth, int64_t stride, int64_t box_rows) const {
    Mapped m;
    static_cast<Parameters&>(m) = p;
    for (int k = 0; k < 2; ++k)
      m.map[k] = ptx::tensor_map<__nv_bfloat16>(p.in[k * second], rows, depth, stride, static_cast<int>(box_rows));
    return m;
  }
  template <class Element, int kColumns>
  void product() const {
    (*this)("product", micro::product<Element, kColumns>, 128, sizeof(Tiles<kColumns>), p);
  }

  void launch(const std::string& name) const {
    const int64_t (&n)[4] = p.number;
    if (name == "box") return (*this)("box", box, 32, sizeof(OneBox), mapped(0, n[0], n[1], n[2], n[3]));
    if (name == "ring") return (*this)("ring", ring, 256, sizeof(Ring), mapped(1, 64, 64 * n[0], 64 * n[0], kBoxRows));
    if (name == "phases") return (*this)("phases", phases, 64, sizeof(HandOver), p);
    if (name == "named") return (*this)("named", named, 128, 512, p);
    if (name == "registers") return (*this)("registers", registers, 384, 0, p);
    if (name == "groups") return (*this)("groups", groups, 128, sizeof(Tiles<128>), p);
    if (name == "store_matrices") return (*this)("store_matrices", store_matrices, 32, 512, p);
    if (name == "no_warpgroup") return (*this)("no_warpgroup", groups, 96, sizeof(Tiles<128>), p);
    if (name == "product_bfloat16_64") return product<__nv_bfloat16, 64>();
    if (name == "product_bfloat16_128") return product<__nv_bfloat16, 128>();
    if (name == "product_bfloat16_256") return product<__nv_bfloat16, 256>();
    if (name == "product_float16_64") return product<__half, 64>();
    if (name == "product_float16_128") return product<__half, 128>();
    if (name == "product_float16_256") return product<__half, 256>();
    throw std::runtime_error("no kernel of this name");
  }
};

}  // namespace
}  // namespace smartclip::micro

// Returns 0, or 1 with a text in `error`. The kernel has run when this returns, but for a device's own errors.
extern "C" int micro(const char* name, void* const* addresses, const int64_t* numbers, int64_t blocks, char* error,
                     int room) {
  smartclip::micro::Launcher launcher{};
  launcher.blocks = blocks;
  for (int k = 0; k < 3; ++k) launcher.p.in[k] = addresses[k];
  launcher.p.out = addresses[3];
  for (int k = 0; k < 4; ++k) launcher.p.number[k] = numbers[k];
  try {
    launcher.launch(name);
  } catch (const std::exception& caught) {
    std::snprintf(error, static_cast<size_t>(room), "%s", caught.what());
    return 1;
  }
  return 0;
}
