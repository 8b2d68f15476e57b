// Licensed under the Apache License, Version 2.0; see LICENSE.
// Registers the function of an operator, PD_KERNEL's way, so that missing memory is a MemoryError in Python: Paddle
// does not know std::bad_alloc, which would end the process.
#pragma once

#include <new>
#include <utility>

#include "paddle/common/enforce.h"
#include "paddle/phi/api/all.h"

template <auto function>
struct Kernel;

template <class Return, class... Args, Return (*function)(Args...)>
struct Kernel<function> {
  static Return run(Args... args) try {
    return function(std::forward<Args>(args)...);
  } catch (const std::bad_alloc&) {
    throw common::enforce::EnforceNotMet(common::errors::ResourceExhausted("an operator of emu3_ops found no memory"),
                                         __FILE__, __LINE__);
  }
};

#define KERNEL(function) PD_KERNEL(Kernel<function>::run)
