#include "pool.hpp"

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#if !defined(_WIN32)
#include <pthread.h>
#include <signal.h>
#endif
#if defined(__linux__)
#include <cstring>
#include <dlfcn.h>
#include <link.h>
#endif

namespace larskit {
namespace {

// Threads that stay. They are not OpenMP's, which a forked child cannot use again.
class Pool {
public:
  void run(int helpers, const std::function<void(int)> &body) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      start(helpers);
      body_ = &body;
      next_ = 1;
      wanted_ = helpers;
      ++round_;
    }
    wake_.notify_all();
    body(0);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      wanted_ = 0; // a worker that has not begun by now need not begin
    }
    for (int i = 0; i < 1000 && active_ > 0; ++i)
      std::this_thread::yield(); // falling asleep would take longer than what is left
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return active_ == 0; });
    body_ = nullptr;
  }

private:
  // As many as the system allows: the caller does the work of those that are missing.
  void start(int helpers) {
    try {
      while (int(workers_.size()) < helpers)
        workers_.emplace_back([this, seen = round_] { work(seen); });
    } catch (const std::exception &) {
    }
  }

  void work(std::uint64_t seen) {
#if !defined(_WIN32)
    sigset_t all; // signals are for the program's own threads
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, nullptr);
#endif
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return round_ != seen; });
      seen = round_;
      if (wanted_ == 0)
        continue;
      --wanted_;
      ++active_;
      auto *body = body_;
      const int index = next_++;
      lock.unlock();
      (*body)(index);
      lock.lock();
      if (--active_ == 0)
        done_.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> workers_;
  const std::function<void(int)> *body_ = nullptr;
  std::atomic<int> active_{0};
  int next_ = 0, wanted_ = 0;
  std::uint64_t round_ = 0;
};

// Never destroyed, so that the threads may outlive the interpreter; recreated in a forked
// child, which inherits the object but none of its threads.
std::atomic<Pool *> pool{nullptr};
std::mutex *using_pool = new std::mutex;
std::atomic<unsigned> fork_count{0};

#if !defined(_WIN32)
void forget_threads() {
  pool = nullptr;
  using_pool = new std::mutex;
  ++fork_count;
}
const int registered = pthread_atfork(nullptr, nullptr, forget_threads);
#endif

// The entry of GNU's OpenMP library that runs a function on a team of threads. LLVM's and
// Intel's have it too, on Linux.
using Team = void (*)(void (*body)(void *), void *data, unsigned threads, unsigned flags);

#if defined(__linux__)
// The one that torch itself calls: another package may have loaded another copy, whose
// threads would be in the way of torch's.
Team find_team() {
  void *library = nullptr;
  dl_iterate_phdr(
      [](dl_phdr_info *info, std::size_t, void *found) {
        if (!std::strstr(info->dlpi_name, "/libtorch_cpu.so"))
          return 0;
        *static_cast<void **>(found) = dlopen(info->dlpi_name, RTLD_LAZY | RTLD_NOLOAD);
        return 1;
      },
      &library);
  return library ? reinterpret_cast<Team>(dlsym(library, "GOMP_parallel")) : nullptr;
}
#else
Team find_team() { return nullptr; }
#endif

// After a backward pass torch's threads spin for milliseconds, waiting for more work, on
// the very cores that threads of our own would need.
bool run_on_team(int threads, const std::function<void(int)> &body) {
  if (fork_count) // GNU's library does not survive a fork
    return false;
  static const Team team = find_team();
  if (!team)
    return false;
  struct Shared {
    const std::function<void(int)> &body;
    std::atomic<int> next{0};
  } shared{body};
  const auto enter = [](void *data) {
    auto &shared = *static_cast<Shared *>(data);
    shared.body(shared.next++);
  };
  team(enter, &shared, unsigned(threads), 0);
  return true;
}

} // namespace

void parallel(int threads, bool with_torch, const std::function<void(int)> &body) {
  if (threads > 1 && with_torch && run_on_team(threads, body))
    return;
  std::unique_lock<std::mutex> mine(*using_pool, std::defer_lock);
  if (threads <= 1 || !mine.try_lock()) // or another Python thread has the pool
    return body(0);
  if (!pool)
    pool = new Pool;
  pool.load()->run(threads - 1, body);
}

unsigned forks() { return fork_count; }

} // namespace larskit
