#include "tests/dist/store_cases.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <xxhash.h>

#include <cstdio>

#include "dist/comm.h"

namespace graft::dist::testing {

at::Tensor pattern(int block) {
  return ((at::arange(700 + 300 * block, at::kLong) * 7 + block * 31) % 251).to(at::kByte);
}

TestStore::TestStore(Comm& comm, at::Device device, int num_blocks) : store_(comm, device) {
  const int pool = store_.add_pool(2);
  for (int i = 0; i < num_blocks; ++i) store_.add_block(pattern(i).numel(), pool);
  store_.allocate();
  for (int i = 0; i < num_blocks; ++i) {
    const at::Tensor bytes = pattern(i);
    store_.write(i, 0, bytes.narrow(0, 0, 333));  // in two parts, as tensors come one by one
    store_.write(i, 333, bytes.narrow(0, 333, bytes.numel() - 333));
  }
}

void expect_block(BlockStore& store, int block) {
  const at::Tensor expected = pattern(block);
  EXPECT_TRUE(at::equal(store.bytes(block, 0, expected.numel()).cpu(), expected)) << block;
  EXPECT_TRUE(at::equal(store.bytes(block, 400, 200).cpu(), expected.narrow(0, 400, 200)));
}

namespace {

void sweep(BlockStore& store) {
  const int last = store.num_blocks() - 1;
  for (int i = 0; i <= last; ++i) {
    const Pin pin(store, i, i < last ? i + 1 : -1);
    expect_block(store, i);
  }
  for (int i = last; i >= 0; --i) {
    const Pin pin(store, i, i - 1);
    expect_block(store, i);
  }
}

std::string hash_by_reference(int num_blocks) {
  std::vector<at::Tensor> blocks;
  for (int i = 0; i < num_blocks; ++i) blocks.push_back(pattern(i));
  const at::Tensor all = at::cat(blocks);
  const XXH128_hash_t hash = XXH3_128bits(all.const_data_ptr(), all.numel());
  char hex[33];
  std::snprintf(hex, sizeof hex, "%016llx%016llx", static_cast<unsigned long long>(hash.high64),
                static_cast<unsigned long long>(hash.low64));
  return hex;
}

}  // namespace

void expect_sweeps(Comm& comm, at::Device device) {
  constexpr int kBlocks = 7;
  TestStore store(comm, device, kBlocks);
  int64_t up = 0, down = 0, first_two = 0;  // a block's bytes received from the other ranks
  for (int i = 0; i < kBlocks; ++i) {
    const int64_t received = (comm.size() - 1) * store->shard_bytes(i);
    (i < 2 ? first_two : up) += received;
    if (i < kBlocks - 2) down += received;
  }
  int64_t expected = first_two;
  for (int repeat = 0; repeat < 3; ++repeat) {
    sweep(*store);
    expected += up + down;
    EXPECT_EQ(comm.bytes(Traffic::kGathered), expected) << "after sweep " << repeat;
  }
  EXPECT_EQ(store->hash(), hash_by_reference(kBlocks));
  EXPECT_EQ(comm.bytes(Traffic::kGathered), expected);  // hashing is control traffic
}

}  // namespace graft::dist::testing
