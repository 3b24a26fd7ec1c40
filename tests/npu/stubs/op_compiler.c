// libacl_op_compiler.so: the options torch_npu sets while it starts; there is nothing to compile.
#include <acl/acl_op_compiler.h>
#include <string.h>

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
