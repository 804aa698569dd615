// The threads that share the work of a call.
#pragma once

#include <functional>

namespace larskit {

// Call body(0) here, and body(1), body(2), ... on other threads, `threads` in all if so
// many are free: each body must be able to do what the others leave. The threads are those
// of the OpenMP team that torch runs its operations on, where `with_torch` says that torch
// is loaded and a team can be found; else those of a pool of our own.
void parallel(int threads, bool with_torch, const std::function<void(int)> &body);

// How often this process was forked since the module was loaded. What another thread was
// doing at a fork is never finished in the child.
unsigned forks();

} // namespace larskit
