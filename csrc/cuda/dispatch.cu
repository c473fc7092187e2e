// Which kernels were built, and the kernels that are the same for all.
#include "kernels.h"
#include "vectors.cuh"

namespace smartclip::cuda {
namespace sm80 {
const Kernels* find_bfloat16(const std::string& similarity, const std::string& objective);
const Kernels* find_float16(const std::string& similarity, const std::string& objective);
const Kernels* find_float32(const std::string& similarity, const std::string& objective);
const Kernels* find_tf32(const std::string& similarity, const std::string& objective);
}  // namespace sm80
#ifdef SK_SM90
namespace sm90 {
const Kernels* find_bfloat16(const std::string& similarity, const std::string& objective);
const Kernels* find_float16(const std::string& similarity, const std::string& objective);
}  // namespace sm90
#endif

const Kernels* find(const std::string& architecture, const std::string& element, const std::string& similarity,
                    const std::string& objective) {
#ifdef SK_SM90
  if (architecture == "sm_90a") {
    if (element == "bfloat16") return sm90::find_bfloat16(similarity, objective);
    if (element == "float16") return sm90::find_float16(similarity, objective);
    return nullptr;
  }
#endif
  if (architecture != "sm_80") return nullptr;
  if (element == "bfloat16") return sm80::find_bfloat16(similarity, objective);
  if (element == "float16") return sm80::find_float16(similarity, objective);
  if (element == "float32") return sm80::find_float32(similarity, objective);
  if (element == "tf32") return sm80::find_tf32(similarity, objective);
  return nullptr;
}

void unit_of(const Unit& p, Stream stream) {
  launch("unit", unit<kOneBlock>, {1, kOneBlock, sizeof(float) * kOneBlock / 32}, stream, p);
}

void parameter_gradient_of(const ParameterGradient& p, Stream stream) {
  launch("parameter_gradient", parameter_gradient<kOneBlock>, {1, kOneBlock, sizeof(double) * kOneBlock / 32}, stream,
         p);
}

}  // namespace smartclip::cuda
