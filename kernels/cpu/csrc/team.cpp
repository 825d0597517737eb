// The threads are those of the OpenMP runtime, which torch uses too. How they wait for one another:
//   1. some microseconds spinning: most waits are shorter;
//   2. then spinning and giving way in turns. If nobody wants the core, giving way returns at once;
//   3. if it does not, others need the processor: this and the next waits are spent asleep.
#include "team.h"

#include <omp.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>

namespace pdarts {

namespace {

using Clock = std::chrono::steady_clock;

constexpr int kSpins = 64;                             // between two looks at the clock
constexpr std::chrono::microseconds kAlone{500};       // giving way returns sooner if nobody waits
constexpr std::chrono::milliseconds kPatience{4};      // then a thread sleeps anyway
constexpr std::chrono::milliseconds kPoliteness{100};  // how long it sleeps at once after that

// When waits may give way instead of sleeping again, as a time of the clock.
std::atomic<int64_t> polite_until{0};

int64_t ticks(Clock::time_point t) { return t.time_since_epoch().count(); }

void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Where threads wait for a condition that another one makes true before it calls `wake`.
class Gate {
 public:
  template <class Ready>
  void wait(Ready ready) {
    if (spin(ready)) return;
    auto now = Clock::now();
    const auto end = now + kPatience;
    while (ticks(now) >= polite_until.load(std::memory_order_relaxed) && now < end) {
      const auto before = now;
      std::this_thread::yield();
      now = Clock::now();
      if (now - before > kAlone)
        polite_until.store(ticks(now + kPoliteness), std::memory_order_relaxed);
      if (spin(ready)) return;
      now = Clock::now();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    ++sleepers_;
    condition_.wait(lock, ready);
    --sleepers_;
  }

  void wake() {
    if (sleepers_.load() == 0) return;
    { std::lock_guard<std::mutex> lock(mutex_); }
    condition_.notify_all();
  }

 private:
  template <class Ready>
  bool spin(Ready ready) {
    for (int i = 0; i < kSpins; ++i) {
      if (ready()) return true;
      pause();
    }
    return ready();
  }

  std::atomic<int> sleepers_{0};
  std::mutex mutex_;
  std::condition_variable condition_;
};

}  // namespace

// Atomic operations are in one order for all threads, so that a sleeper is seen by whom it waits for.
class Team {
 public:
  // Of the leading thread, before its first job: how many threads there are.
  void lead(int64_t threads) { threads_ = threads; }

  // Of the leading thread.
  void run(Job job, void* data) {
    job_ = job;
    data_ = data;
    for (Counter& counter : counters_) counter.next.store(0, std::memory_order_relaxed);
    done_.store(1);
    ++jobs_;
    gate_.wake();
    if (job) {
      Member member(*this);
      job(data, member);
    }
    leader_.wait([&] { return done_.load() == threads_; });
  }

  // Of the others: takes part in jobs until there is none.
  void serve() {
    for (int64_t seen = 0;; ++seen) {
      gate_.wait([&] { return jobs_.load() != seen; });
      const Job job = job_;
      if (job) {
        Member member(*this);
        job(data_, member);
      }
      ++done_;
      leader_.wake();
      if (!job) return;
    }
  }

  int64_t claim(int64_t loop) {
    return counters_[loop % kLoops].next.fetch_add(1, std::memory_order_relaxed);
  }

  void meet() {
    const int64_t round = rounds_.load();
    if (arrived_.fetch_add(1) + 1 < threads_) {
      gate_.wait([&] { return rounds_.load() != round; });
      return;
    }
    arrived_.store(0);
    ++rounds_;
    gate_.wake();
  }

 private:
  static constexpr int64_t kLoops = 4;  // that a job has at most

  struct alignas(64) Counter {
    std::atomic<int64_t> next{0};
  };

  int64_t threads_ = 1;
  Job job_ = nullptr;
  void* data_ = nullptr;
  Counter counters_[kLoops];
  alignas(64) std::atomic<int64_t> jobs_{0};
  std::atomic<int64_t> rounds_{0};
  alignas(64) std::atomic<int64_t> arrived_{0};
  std::atomic<int64_t> done_{0};
  Gate gate_, leader_;
};

namespace {

thread_local Team* current = nullptr;  // that of which this thread is the leader

}  // namespace

int64_t Member::claim() { return team_.claim(loop_); }

void Member::wait() { team_.meet(); }

void with_team(int64_t threads, void (*body)(void*), void* data) {
  if (current) return body(data);
  Team team;
#pragma omp parallel num_threads(static_cast<int>(threads))
  {
    if (omp_get_thread_num() == 0) {
      team.lead(omp_get_num_threads());
      current = &team;
      body(data);
      current = nullptr;
      team.run(nullptr, nullptr);
    } else {
      team.serve();
    }
  }
}

void run_job(int64_t threads, Job job, void* data) {
  if (current) return current->run(job, data);
  struct Alone {
    Job job;
    void* data;
  } alone{job, data};
  with_team(
      threads,
      [](void* raw) {
        const Alone& of = *static_cast<Alone*>(raw);
        current->run(of.job, of.data);
      },
      &alone);
}

}  // namespace pdarts
