// In the place of the toolkit's header.
#pragma once

#include "cuda_emulation.h"
