// What torch_npu links but nothing here emulates: every call fails and says its name. Kernels are among them, so an
// operator that no reference kernel stands for fails, too. Profiling, logging and what describes an
// operator that will fail say yes.
#include "emulated.h"

enum { ACL_ERROR_API_NOT_SUPPORT = 200001 };
#define REFUSE(name) \
  int name(void) { return emulated_error("the emulation has no " #name), ACL_ERROR_API_NOT_SUPPORT; }
#define ACCEPT(name) \
  int name(void) { return 0; }

ACCEPT(MsprofRegisterCallback)
ACCEPT(MsprofGetHashId)
ACCEPT(MsprofReportAdditionalInfo)
ACCEPT(MsprofReportApi)
ACCEPT(MsprofReportCompactInfo)
ACCEPT(MsprofSysCycleTime)
ACCEPT(aclAppLog)

ACCEPT(aclSetTensorDescName)
ACCEPT(aclSetTensorFormat)
ACCEPT(aclSetTensorPlaceMent)
ACCEPT(aclSetTensorShape)
ACCEPT(aclopDestroyAttr)
ACCEPT(aclopSetAttrBool)
ACCEPT(aclopSetAttrDataType)
ACCEPT(aclopSetAttrFloat)
ACCEPT(aclopSetAttrInt)
ACCEPT(aclopSetAttrListBool)
ACCEPT(aclopSetAttrListFloat)
ACCEPT(aclopSetAttrListInt)
ACCEPT(aclopSetAttrListListInt)
ACCEPT(aclopSetAttrString)

REFUSE(aclGetDeviceCapability)
REFUSE(aclGetTensorDescDimV2)
REFUSE(aclGetTensorDescFormat)
REFUSE(aclGetTensorDescNumDims)
REFUSE(aclGetTensorDescType)
REFUSE(aclmdlFinalizeDump)
REFUSE(aclmdlInitDump)
REFUSE(aclmdlSetDump)
REFUSE(aclrtBinaryGetFunction)
REFUSE(aclrtBinaryLoadFromData)
REFUSE(aclrtDeviceCanAccessPeer)
REFUSE(aclrtDeviceEnablePeerAccess)
REFUSE(aclrtDeviceGetBareTgid)
REFUSE(aclrtFreePhysical)
REFUSE(aclrtGetFunctionAddr)
REFUSE(aclrtMallocPhysical)
REFUSE(aclrtMapMem)
REFUSE(aclrtMemExportToShareableHandle)
REFUSE(aclrtMemImportFromShareableHandle)
REFUSE(aclrtMemSetPidToShareableHandle)
REFUSE(aclrtProcessReport)
REFUSE(aclrtReleaseMemAddress)
REFUSE(aclrtReserveMemAddress)
REFUSE(aclrtUnmapMem)
REFUSE(rtDevBinaryRegister)
REFUSE(rtFunctionRegister)
REFUSE(rtGetC2cCtrlAddr)
REFUSE(rtKernelLaunch)
