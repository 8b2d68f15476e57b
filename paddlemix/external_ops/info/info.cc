// Licensed under the Apache License, Version 2.0; see LICENSE.
// What Python asks of the compiled operators, by ctypes: numbers that stand in the headers, and in the wrappers too.
#include "../cached_attention/cached_attention.h"
#include "../few_rows_linear/few_rows_linear.h"
#include "../winograd/winograd.h"

extern "C" {

int emu3_ops_version() { return 5; }  // of what the operators take; external_ops/__init__.py names the one it calls

int emu3_ops_level() { return simd::level(); }

int emu3_ops_group() { return few_rows_linear::GROUP; }

int emu3_ops_few_rows() { return few_rows_linear::FEW_ROWS; }

int emu3_ops_most_new() { return cached_attention::MOST_NEW; }

int emu3_ops_winograd_inputs() { return winograd::INPUTS; }

int emu3_ops_winograd_outputs() { return winograd::OUTPUTS; }
}
