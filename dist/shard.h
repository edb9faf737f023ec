// Which bytes of a block live on which rank. Pure arithmetic: a block's payload is padded to a
// multiple of world x 256 bytes and cut into `world` equal ranges, so every shard starts aligned
// for any element type.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace graft::dist {

inline constexpr int64_t kShardAlignment = 256;

/// A part of a block on one rank; begin and end are offsets in the block, end excluded.
struct ShardPiece {
  int rank;
  int64_t begin, end;
};

/// Bytes of each rank's shard of a block with `bytes` of payload.
inline int64_t shard_size(int64_t bytes, int world) {
  const int64_t unit = kShardAlignment * world;
  return (bytes + unit - 1) / unit * kShardAlignment;
}

/// The non-empty parts of [begin, end) in rank order, where each rank holds `shard_bytes`.
inline std::vector<ShardPiece> shard_pieces(int64_t shard_bytes, int64_t begin, int64_t end) {
  std::vector<ShardPiece> pieces;
  while (begin < end) {
    const int64_t rank = begin / shard_bytes;
    const int64_t stop = std::min(end, (rank + 1) * shard_bytes);
    pieces.push_back({static_cast<int>(rank), begin, stop});
    begin = stop;
  }
  return pieces;
}

}  // namespace graft::dist
