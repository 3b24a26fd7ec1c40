// libacl_op_compiler.so: the options torch_npu sets while it starts. A kernel that it calls without its dispatcher, for
// which no reference kernel can stand, fails by its name.
#include <acl/acl_op_compiler.h>
#include <string.h>

#include "emulated.h"

enum { NOT_SUPPORTED = 200001 };

static char options[64][64];

aclError aclSetCompileopt(aclCompileOpt option, const char *value) {
  strncpy(options[option], value, sizeof options[option] - 1);
  return 0;
}

size_t aclGetCompileoptSize(aclCompileOpt option) { return strlen(options[option]) + 1; }

aclError aclGetCompileopt(aclCompileOpt option, char *value, size_t room) {
  strncpy(value, options[option], room);
  return 0;
}

// What describes an operator is accepted, so that running it is what fails.
static int handle;
aclDataBuffer *aclCreateDataBuffer(void *data, size_t bytes) { return (aclDataBuffer *)&handle; }
aclError aclDestroyDataBuffer(const aclDataBuffer *buffer) { return 0; }
void aclDestroyTensorDesc(const aclTensorDesc *desc) {}
aclopAttr *aclopCreateAttr(void) { return (aclopAttr *)&handle; }

aclTensorDesc *aclCreateTensorDesc(aclDataType type, int dims, const int64_t *shape, aclFormat format) {
  return (aclTensorDesc *)&handle;
}

aclError aclopCompileAndExecute(
    const char *name, int num_inputs, const aclTensorDesc *const input_desc[], const aclDataBuffer *const inputs[],
    int num_outputs, const aclTensorDesc *const output_desc[], aclDataBuffer *const outputs[], const aclopAttr *attr,
    aclopEngineType engine, aclopCompileType compile, const char *path, aclrtStream stream) {
  emulated_error("the emulation has no kernel %s", name);
  return NOT_SUPPORTED;
}
