// BlockStore: the bytes of the frozen base, cut over the ranks of a shard group block by block.
// A block (one transformer layer, the embedding, the head) is gathered when it is pinned, into the
// buffers of its pool, and stays there until the buffer is needed: bytes never change, so a block
// that is still there is not gathered again. Only models/trunk pins. It knows bytes, not weights.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "dist/shard.h"

namespace graft::dist {

class Comm;

class BlockStore {
 public:
  /// @param comm    the shard group; a group of one keeps whole blocks and never copies them
  /// @param device  where shards and buffers live
  BlockStore(Comm& comm, at::Device device);
  ~BlockStore();
  BlockStore(const BlockStore&) = delete;
  BlockStore& operator=(const BlockStore&) = delete;

  /// A set of `num_buffers` equal buffers that its blocks share when gathered (2: the layer window;
  /// 1: an edge).
  /// @return the number of the pool
  int add_pool(int num_buffers);
  /// @param bytes  payload; padded to a multiple of size() x 256
  /// @return the number of the block
  int add_block(int64_t bytes, int pool) { return add_block(bytes, pool, bytes); }
  /// @param frozen_bytes  the payload behind these belongs to thawed weights: hash() leaves it out
  int add_block(int64_t bytes, int pool, int64_t frozen_bytes);
  /// Allocates this rank's shards. No block may be added after.
  void allocate();

  /// Stores the part of `bytes` [n] (uint8, CPU) that this rank owns; `offset` counts from the
  /// start of the block. Only before the block's first gather.
  void write(int block, int64_t offset, const at::Tensor& bytes);
  /// Stores bytes that one rank holds: `owner` gives them (uint8 [bytes], CPU), the others an
  /// undefined tensor, and each rank keeps its part. Collective.
  void scatter(int block, int64_t offset, int64_t bytes, const at::Tensor& payload, int owner);
  /// The ranks whose shards the range [offset, offset + bytes) of `block` touches: whom a loader
  /// sends to.
  using Piece = ShardPiece;
  std::vector<Piece> pieces(int block, int64_t offset, int64_t bytes) const;
  /// The part of [offset, offset + bytes) that this rank owns, uint8, in place: for a thawed
  /// weight, whose owner writes it between sweeps and then calls changed().
  at::Tensor own(int block, int64_t offset, int64_t bytes);
  /// Bytes of a block were written: what was gathered of it is out of date. Every rank says so,
  /// while nothing of the block is pinned or under way.
  void changed(int block);
  /// What the ranks hold of one tensor, one after the other on rank 0; undefined on the others.
  /// Collective (Traffic::kControl).
  /// @param mine   [sizes[rank()]]
  /// @param sizes  elements of each rank
  at::Tensor collect(const at::Tensor& mine, std::span<const int64_t> sizes) const;

  /// Makes a block readable (gathers it unless it is there), then starts gathering `next` (or -1:
  /// none). All ranks pin and unpin the same blocks in the same order; each block is gathered into
  /// the buffer of its pool that was used longest ago, never over a pinned block or one that was
  /// announced as `next` and is still to be pinned.
  /// @throws graft::Error (kBug) if the pool has no such buffer, or a rank gathers another block
  void pin(int block, int next = -1);
  void unpin(int block);
  /// The bytes [offset, offset + bytes) of a pinned block, uint8, a view into the buffer: never
  /// save it for backward.
  /// @throws graft::Error (kBug) if the block is not pinned
  at::Tensor bytes(int block, int64_t offset, int64_t bytes) const;

  int rank() const;   ///< in the shard group
  int world() const;  ///< ranks of the shard group
  at::Device device() const;
  int num_blocks() const;
  int64_t block_bytes(int block) const;  ///< payload
  int64_t shard_bytes(int block) const;  ///< padded bytes on each rank
  int64_t resident_bytes() const;        ///< shards and buffers of this rank
  /// XXH3-128 over the frozen payload of all blocks in order, as hex: equal at any world size.
  /// Collective; rank 0 receives every shard once (Traffic::kControl).
  std::string hash() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// Holds a block pinned.
class Pin {
 public:
  Pin(BlockStore& store, int block, int next = -1) : store_(store), block_(block) {
    store_.pin(block, next);
  }
  ~Pin() { store_.unpin(block_); }
  Pin(const Pin&) = delete;
  Pin& operator=(const Pin&) = delete;

 private:
  BlockStore& store_;
  int block_;
};

}  // namespace graft::dist
