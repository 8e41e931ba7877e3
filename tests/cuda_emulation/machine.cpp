// What the tests ask of the emulation itself, for ctypes.
#include "cuda_emulation.h"

extern "C" {

const char* emulation_error() { return cuda_emulation::machine().error.c_str(); }

void emulation_reverse(bool reversed) { cuda_emulation::machine().reversed = reversed; }

// Kernels, and fills of memory, since the last call.
int emulation_launches() {
  const int launches = cuda_emulation::machine().launches;
  cuda_emulation::machine().launches = 0;
  return launches;
}

}  // extern "C"
