#include "dist/shard.h"

#include <gtest/gtest.h>

namespace graft::dist {
namespace {

TEST(Shard, PadsToTheSmallestMultipleOfWorldTimes256) {
  EXPECT_EQ(shard_size(0, 4), 0);
  EXPECT_EQ(shard_size(1, 4), 256);
  EXPECT_EQ(shard_size(1024, 4), 256);
  EXPECT_EQ(shard_size(1025, 4), 512);
  EXPECT_EQ(shard_size(1000, 1), 1024);
}

TEST(Shard, PiecesCoverTheRangeOnceInOrderAndStayOnTheirRank) {
  for (const int world : {1, 2, 3, 7}) {
    for (const int64_t bytes : {1, 256, 5000, 7 * 256}) {
      const int64_t shard = shard_size(bytes, world);
      for (int64_t begin = 0; begin <= bytes; begin += 97) {
        int64_t next = begin;
        for (const ShardPiece& piece : shard_pieces(shard, begin, bytes)) {
          EXPECT_EQ(piece.begin, next);
          EXPECT_LT(piece.begin, piece.end);
          EXPECT_GE(piece.begin, piece.rank * shard);
          EXPECT_LE(piece.end, (piece.rank + 1) * shard);
          EXPECT_LT(piece.rank, world);
          next = piece.end;
        }
        EXPECT_EQ(next, bytes);
      }
    }
  }
}

}  // namespace
}  // namespace graft::dist
