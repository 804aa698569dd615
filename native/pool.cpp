#include "pool.hpp"

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

#if !defined(_WIN32)
#include <pthread.h>
#include <signal.h>
#endif

namespace larskit {
namespace {

class Pool {
public:
  void run(int count, int helpers, const std::function<void(int)> &task) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (int(workers_.size()) < helpers)
        workers_.emplace_back([this, seen = round_] { work(seen); });
      task_ = &task;
      count_ = count;
      next_ = 0;
      wanted_ = helpers;
      ++round_;
    }
    wake_.notify_all();
    drain(task, count);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      wanted_ = 0; // a worker that has not begun by now need not begin
    }
    for (int i = 0; i < 1000 && active_ > 0; ++i)
      std::this_thread::yield(); // falling asleep would take longer than what is left
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return active_ == 0; });
    task_ = nullptr;
  }

private:
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
      auto *task = task_;
      int count = count_;
      lock.unlock();
      drain(*task, count);
      lock.lock();
      if (--active_ == 0)
        done_.notify_one();
    }
  }

  void drain(const std::function<void(int)> &task, int count) {
    for (int i = next_++; i < count; i = next_++)
      task(i);
  }

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> workers_;
  const std::function<void(int)> *task_ = nullptr;
  std::atomic<int> next_{0}, active_{0};
  int count_ = 0, wanted_ = 0;
  std::uint64_t round_ = 0;
};

// Never destroyed, so that the threads may outlive the interpreter; recreated
// in a forked child, which inherits the object but none of its threads.
std::atomic<Pool *> pool{nullptr};
std::mutex *using_pool = new std::mutex;

#if !defined(_WIN32)
void forget_pool() {
  pool = nullptr;
  using_pool = new std::mutex;
}
#endif

Pool &the_pool() {
  if (!pool) {
#if !defined(_WIN32)
    static const int registered = pthread_atfork(nullptr, nullptr, forget_pool);
    (void)registered;
#endif
    pool = new Pool;
  }
  return *pool;
}

} // namespace

void parallel(int count, int threads, const std::function<void(int)> &task) {
  std::unique_lock<std::mutex> mine(*using_pool, std::defer_lock);
  if (threads > 1 && count > 1 && mine.try_lock()) {
    the_pool().run(count, (threads < count ? threads : count) - 1, task);
    return;
  }
  for (int i = 0; i < count; ++i)
    task(i);
}

} // namespace larskit
