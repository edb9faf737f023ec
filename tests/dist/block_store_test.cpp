#include "dist/block_store.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "configs/check.h"
#include "dist/comm_factory.h"
#include "tests/dist/store_cases.h"

namespace graft::dist {
namespace {

using testing::expect_block;
using testing::expect_sweeps;
using testing::pattern;
using testing::TestStore;

ExitCode code_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.code();
  }
  return ExitCode::kDone;
}

TEST(BlockStore, ReadsWhatWasWrittenAndCountsItsGathers) {
  for (int world = 1; world <= 4; ++world) {
    run_virtual_ranks(world, [](Comm& comm) { expect_sweeps(comm, at::kCPU); });
  }
}

TEST(BlockStore, ThrowsForABlockThatIsNotPinned) {
  for (const int world : {1, 2}) {
    run_virtual_ranks(world, [](Comm& comm) {
      TestStore store(comm, at::kCPU, 3);
      EXPECT_EQ(code_of([&] { store->bytes(0, 0, 1); }), ExitCode::kBug);
      {
        const Pin pin(*store, 0, 1);
        EXPECT_EQ(code_of([&] { store->bytes(1, 0, 1); }), ExitCode::kBug);  // only announced
      }
      EXPECT_EQ(code_of([&] { store->bytes(0, 0, 1); }), ExitCode::kBug);
      EXPECT_EQ(code_of([&] { store->unpin(0); }), ExitCode::kBug);
    });
  }
}

TEST(BlockStore, ThrowsOnEveryRankIfOneAsksForAnotherBlock) {
  run_virtual_ranks(3, [](Comm& comm) {
    TestStore store(comm, at::kCPU, 3);
    EXPECT_EQ(code_of([&] { store->pin(comm.rank() == 2 ? 1 : 0); }), ExitCode::kBug);
  });
}

TEST(BlockStore, NeverEvictsAPinnedOrAnnouncedBlock) {
  run_virtual_ranks(2, [](Comm& comm) {
    TestStore store(comm, at::kCPU, 4);
    {
      const Pin zero(*store, 0), one(*store, 1);
      EXPECT_EQ(code_of([&] { store->pin(2); }), ExitCode::kBug);
      expect_block(*store, 0);
      expect_block(*store, 1);
    }
    const Pin zero(*store, 0, 3);
    EXPECT_EQ(code_of([&] { store->pin(2); }), ExitCode::kBug);
    const Pin three(*store, 3);
    expect_block(*store, 0);
    expect_block(*store, 3);
  });
}

TEST(BlockStore, AWorldOfOneViewsItsBytesAndReceivesNothing) {
  const auto comm = make_single_comm();
  TestStore store(*comm, at::kCPU, 2);
  const Pin pin(*store, 1);
  EXPECT_EQ(store->bytes(1, 0, 8).const_data_ptr(), store->bytes(1, 0, 8).const_data_ptr());
  EXPECT_EQ(comm->bytes(Traffic::kGathered), 0);
  EXPECT_EQ(store->resident_bytes(), store->shard_bytes(0) + store->shard_bytes(1));
}

TEST(BlockStore, EachRankHoldsItsShareAndTheBuffers) {
  run_virtual_ranks(4, [](Comm& comm) {
    BlockStore store(comm, at::kCPU);
    const int layers = store.add_pool(2), edge = store.add_pool(1);
    store.add_block(4096, layers);
    store.add_block(5000, layers);  // padded to 5120
    store.add_block(1024, edge);
    store.allocate();
    EXPECT_EQ(store.resident_bytes(), (4096 + 5120 + 1024) / 4 + 2 * 5120 + 1024);
  });
}

TEST(BlockStore, NamesTheRanksOfARange) {
  run_virtual_ranks(2, [](Comm& comm) {
    BlockStore store(comm, at::kCPU);
    store.add_block(1000, store.add_pool(1));
    store.allocate();
    const auto pieces = store.pieces(0, 500, 100);
    ASSERT_EQ(pieces.size(), 2u);
    EXPECT_EQ(pieces[0].rank, 0);
    EXPECT_EQ(pieces[0].end, 512);
    EXPECT_EQ(pieces[1].begin, 512);
    EXPECT_EQ(code_of([&] { store.pieces(0, 500, 501); }), ExitCode::kBug);
  });
}

TEST(BlockStore, RefusesToChangeBytesThatWereGathered) {
  run_virtual_ranks(2, [](Comm& comm) {
    TestStore store(comm, at::kCPU, 2);
    { const Pin pin(*store, 0); }
    EXPECT_EQ(code_of([&] { store->write(0, 0, pattern(0)); }), ExitCode::kBug);
  });
}

TEST(BlockStore, HashOfNothingIsTheAlgorithmsOwn) {
  const auto comm = make_single_comm();
  BlockStore store(*comm, at::kCPU);
  store.allocate();
  // XXH3-128 of the empty input, from the reference implementation's test vectors.
  EXPECT_EQ(store.hash(), "99aa06d3014798d86001c324468d497f");
}

TEST(BlockStore, HashSeesOneChangedByte) {
  const auto comm = make_single_comm();
  TestStore store(*comm, at::kCPU, 3);
  const std::string before = store->hash();
  store->write(1, 3, store.payload(1).narrow(0, 3, 1) + 1);
  EXPECT_NE(store->hash(), before);
}

}  // namespace
}  // namespace graft::dist
