// Threads that stay together through all primitives of a pass.
//
// A pass is hundreds of short jobs, and after each of them all threads wait for the last one. Those of
// OpenMP either spin while they wait, on a core that the last one may need, or sleep at once and are slow
// to wake. Members of a team look whether somebody else wants their core: see team.cpp.
//
// Nothing here is inline: the linker would keep one processor's copy for all.
#pragma once

#include <cstdint>

namespace pdarts {

class Team;

// One thread in a job. All threads of a job call the same methods in the same order.
class Member {
 public:
  explicit Member(Team& team) : team_(team) {}

  // The next piece of the loop that the threads share: 0, 1, ...
  int64_t claim();

  // Later pieces are those of another loop.
  void end_loop() { ++loop_; }

  // Returns when all threads are here.
  void wait();

 private:
  Team& team_;
  int64_t loop_ = 0;
};

using Job = void (*)(void* data, Member& member);

// Runs body(data) on this thread, whose calls of `run_job` then share one team of threads.
void with_team(int64_t threads, void (*body)(void* data), void* data);

// Runs a job on every thread of the team, or of one made for it, and returns when all have finished.
void run_job(int64_t threads, Job job, void* data);

}  // namespace pdarts
