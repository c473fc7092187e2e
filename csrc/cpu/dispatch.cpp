// Which instruction sets were built, and which of them this machine has.
#include "kernels.h"

namespace smartclip {

#define SK_DECLARE(isa)                                                                        \
  namespace isa {                                                                              \
  template <class T>                                                                           \
  const Kernels<T>* find(const std::string& similarity, const std::string& objective);         \
  extern template const Kernels<float>* find<float>(const std::string&, const std::string&);   \
  extern template const Kernels<double>* find<double>(const std::string&, const std::string&); \
  }
#define SK_ENTRY(isa, runs_here) {#isa, [] { return bool(runs_here); }, isa::find<float>, isa::find<double>}

SK_DECLARE(portable)
#if defined(__x86_64__)
SK_DECLARE(avx2)
SK_DECLARE(avx512)
#endif

const Isa kIsas[] = {
#if defined(__x86_64__)
    SK_ENTRY(avx512, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")),
    SK_ENTRY(avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")),
#endif
    SK_ENTRY(portable, true),
};
const int kIsaCount = sizeof(kIsas) / sizeof(kIsas[0]);

}  // namespace smartclip
