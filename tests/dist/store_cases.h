// A BlockStore with known bytes, and the gather schedule of a sweep, for any group of ranks.
#pragma once

#include "dist/block_store.h"

namespace graft::dist::testing {

/// The bytes of block i: different in every block and place, 700 + 300 i of them, so padding is
/// never zero.
at::Tensor pattern(int block);

/// `num_blocks` blocks in one pool of two buffers, written and ready.
class TestStore {
 public:
  TestStore(Comm& comm, at::Device device, int num_blocks);
  BlockStore* operator->() { return &store_; }
  BlockStore& operator*() { return store_; }
  static at::Tensor payload(int block) { return pattern(block); }

 private:
  BlockStore store_;
};

/// The pinned block holds its pattern.
void expect_block(BlockStore& store, int block);

/// Three sweeps up and down with prefetch: right bytes at every pin, the exact count of bytes
/// received (the first sweep gathers L + L - 2 blocks, the others 2 (L - 2)), and the hash of the
/// whole.
void expect_sweeps(Comm& comm, at::Device device);

}  // namespace graft::dist::testing
