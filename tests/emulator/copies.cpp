// Shared memory, and cp.async: every thread has an engine that copies beside it.
//
// PTX ISA, "cp.async" and "cp.async.wait_group": copies of a thread end in any order, and are there for it once their
// group was waited for. In between, an engine reads and writes at any moment; SMARTCLIP_EMULATOR says which. In the
// latest order, what nobody waits for never lands.
#include <cstring>

#include "state.h"

namespace smartclip::emulator {

unsigned char* Launch::shared() const {
  return arena_->shared_end() - (shared_bytes_ + kSharedAlignment - 1) / kSharedAlignment * kSharedAlignment;
}

bool Launch::holds(const void* address, size_t bytes) const {
  const unsigned char* const first = static_cast<const unsigned char*>(address);
  return first >= shared() && first + bytes <= shared() + shared_bytes_;
}

void Launch::issue(const void* site, void* shared, const void* global, int bytes, Where where) {
  constexpr int kBytes = 16;
  Fibre& fibre = me();
  Engine& engine = *fibre.engine;
  const auto refuse = [&](const std::string& what) { fail(Instruction::kCopy, where, what); };
  if (bytes < 0 || bytes > kBytes) refuse(std::to_string(bytes) + " bytes, needs 0 to 16");
  if (!holds(shared, kBytes)) refuse("16 bytes at " + place(shared));
  if (reinterpret_cast<uintptr_t>(shared) % kBytes != 0) refuse(place(shared) + " is no multiple of 16");
  if (reinterpret_cast<uintptr_t>(global) % kBytes != 0) refuse("the global address is no multiple of 16");
  if (engine.end - engine.first == Engine::kMost) refuse(std::to_string(Engine::kMost) + " copies are under way");
  engine.sequence.create("copies of emulated thread", fibre.thread);
  engine.issued[engine.group % Engine::kGroups].release();
  Copy& copy = engine.at(engine.end++);
  copy.to = static_cast<unsigned char*>(shared);
  copy.from = static_cast<const unsigned char*>(global);
  copy.bytes = bytes;
  copy.site = site;
  copy.group = engine.group;
  copy.was_read = copy.landed = false;
  if (options_.copies == Options::Copies::kEarliest) land(fibre, copy);
  stir(fibre);
}

// An engine's accesses come after those that its thread made before the issue, and are not ordered otherwise.
void Launch::read(Fibre& fibre, Copy& copy) {
  fibre.engine->sequence.enter();
  fibre.engine->issued[copy.group % Engine::kGroups].acquire();
  fibre.engine->sequence.renew();
  tsan::reads(copy.from, copy.bytes, copy.site);
  std::memset(copy.data, 0, sizeof(copy.data));
  std::memcpy(copy.data, copy.from, copy.bytes);
  copy.was_read = true;
  fibre.sequence.enter();
}

void Launch::land(Fibre& fibre, Copy& copy) {
  if (!copy.was_read) read(fibre, copy);
  fibre.engine->sequence.enter();
  tsan::writes(copy.to, sizeof(copy.data), copy.site);
  std::memcpy(copy.to, copy.data, sizeof(copy.data));
  copy.landed = true;
  fibre.sequence.enter();
}

void Launch::wait(int pending) {
  Fibre& fibre = me();
  Engine& engine = *fibre.engine;
  for (int64_t i = engine.first; i < engine.end; ++i) {
    Copy& copy = engine.at(i);
    if (!copy.landed && copy.group < engine.group - pending) land(fibre, copy);
  }
  while (engine.first < engine.end && engine.at(engine.first).landed) ++engine.first;
  if (engine.sequence.exists()) {
    engine.sequence.enter();
    engine.landed.release();
    fibre.sequence.enter();
    engine.landed.acquire();
  }
  stir(fibre);
}

void* shared_storage(size_t bytes, Where where) {
  if (bytes > launch->shared_bytes())
    launch->fail(Instruction::kSharedStorage, where,
                 std::to_string(bytes) + " bytes, the launch gave " + std::to_string(launch->shared_bytes()));
  return launch->shared();
}

uint32_t shared_address(const void* generic, Where where) {
  if (!launch->holds(generic, 1)) launch->fail(Instruction::kSharedAddress, where, launch->place(generic));
  return static_cast<uint32_t>(static_cast<const unsigned char*>(generic) - launch->shared());
}

void copy_async_16(void* shared, const void* global, int bytes, Where where) {
  launch->issue(__builtin_return_address(0), shared, global, bytes, where);
}
void commit_copies() { launch->commit(); }
void wait_for_copies(int pending) { launch->wait(pending); }

}  // namespace smartclip::emulator
