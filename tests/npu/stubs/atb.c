// libatb.so (NNAL): the C++ functions that libop_plugin_atb.so links, by their mangled names. Its operators are run by
// reference kernels, so every one of these fails when called.
#include "emulated.h"

#define REFUSE(number, symbol)                  \
  int refused_##number(void) __asm__(symbol); \
  int refused_##number(void) { return emulated_error("the emulation has no " symbol), 1; }
#define CREATE(number, length, name) \
  REFUSE(number, "_ZN3atb15CreateOperationINS_5infer" length name "EEEiRKT_PPNS_9OperationE")

REFUSE(0, "_ZN3atb13CreateContextEPPNS_7ContextE")
REFUSE(1, "_ZN3atb14DestroyContextEPNS_7ContextE")
REFUSE(2, "_ZN3atb16DestroyOperationEPNS_9OperationE")
REFUSE(3, "_ZN3atb5Utils13GetTensorSizeERKNS_6TensorE")
CREATE(4, "11", "LinearParam")
CREATE(5, "12", "ElewiseParam")
CREATE(6, "12", "RmsNormParam")
CREATE(7, "14", "GroupTopkParam")
CREATE(8, "18", "SelfAttentionParam")
CREATE(9, "19", "PagedAttentionParam")
CREATE(10, "20", "ReshapeAndCacheParam")
CREATE(11, "9", "RopeParam")
