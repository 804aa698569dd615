// A small pool of threads that stay: no OpenMP, of which two runtimes in one process
// do not know of each other.
#pragma once

#include <functional>

namespace larskit {

// Call task(0) ... task(count - 1), each once, on up to `threads` threads of which the
// caller is one. Where another Python thread has the pool, the caller does it alone.
void parallel(int count, int threads, const std::function<void(int)> &task);

} // namespace larskit
