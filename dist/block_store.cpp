#include "dist/block_store.h"

#include <ATen/ATen.h>
#include <xxhash.h>

#include <algorithm>
#include <array>

#include "configs/check.h"
#include "dist/comm.h"

namespace graft::dist {
namespace {

struct Block {
  int64_t bytes, frozen_bytes;
  int64_t shard_bytes;
  int pool;
  at::Tensor shard;
  int buffer = -1;  ///< of its pool; -1: not gathered
  int num_pins = 0;
  std::unique_ptr<Work> gather = nullptr;  ///< under way, or announced and not yet pinned
};

struct Buffer {
  at::Tensor bytes;
  int block = -1;
  int64_t last_use = 0;
};

struct Pool {
  std::vector<Buffer> buffers;
};

struct HashState {
  HashState() { XXH3_128bits_reset(state.get()); }
  std::unique_ptr<XXH3_state_t, decltype(&XXH3_freeState)> state{XXH3_createState(),
                                                                 &XXH3_freeState};
};

std::string to_hex(const at::Tensor& digest) {
  std::string hex;
  const auto* bytes = digest.const_data_ptr<uint8_t>();
  for (int64_t i = 0; i < digest.numel(); ++i) {
    for (const int nibble : {bytes[i] >> 4, bytes[i] & 15}) hex += "0123456789abcdef"[nibble];
  }
  return hex;
}

}  // namespace

struct BlockStore::Impl {
  Comm& comm;
  at::TensorOptions options;
  std::vector<Pool> pools;
  std::vector<Block> blocks;
  bool allocated = false;
  int64_t clock = 0;

  bool sharded() const { return comm.size() > 1; }

  Block& at(int block) {
    GRAFT_ASSERT(block >= 0 && block < static_cast<int>(blocks.size()), "block ", block, " of ",
                 blocks.size());
    return blocks[block];
  }

  void check_range(int block, int64_t offset, int64_t bytes) {
    GRAFT_ASSERT(offset >= 0 && bytes >= 0 && bytes <= at(block).bytes - offset, "bytes ", offset,
                 " to ", offset + bytes, " of block ", block, ", which has ", at(block).bytes);
  }

  /// The buffer of `pool` that was used longest ago among those that nobody needs.
  int free_buffer(const Pool& pool) const {
    int free = -1;
    for (int i = 0; i < static_cast<int>(pool.buffers.size()); ++i) {
      const Buffer& buffer = pool.buffers[i];
      const bool needed =
          buffer.block >= 0 && (blocks[buffer.block].num_pins > 0 || blocks[buffer.block].gather);
      if (needed || (free >= 0 && pool.buffers[free].last_use <= buffer.last_use)) continue;
      free = i;
    }
    return free;
  }

  /// Puts `number` into a buffer, or starts to.
  void start_gather(int number) {
    Block& block = at(number);
    Pool& pool = pools[block.pool];
    if (block.buffer < 0) {
      const int free = free_buffer(pool);
      GRAFT_ASSERT(free >= 0, "block ", number, " finds every buffer of pool ", block.pool,
                   " in use; the pool has ", pool.buffers.size());
      Buffer& buffer = pool.buffers[free];
      if (buffer.block >= 0) blocks[buffer.block].buffer = -1;
      buffer.block = -1;  // holds nothing if the gather fails to start
      at::Tensor out = buffer.bytes.narrow(0, 0, block.shard_bytes * comm.size());
      block.gather = comm.all_gather(block.shard, out, Traffic::kGathered, number);
      block.buffer = free;
      buffer.block = number;
    }
    pool.buffers[block.buffer].last_use = ++clock;
  }
};

BlockStore::BlockStore(Comm& comm, at::Device device)
    : impl_(new Impl{comm, at::TensorOptions().dtype(at::kByte).device(device), {}, {}}) {}
BlockStore::~BlockStore() = default;

int BlockStore::add_pool(int num_buffers) {
  GRAFT_ASSERT(!impl_->allocated && num_buffers > 0, "pool of ", num_buffers, " buffers");
  impl_->pools.emplace_back().buffers.resize(num_buffers);
  return static_cast<int>(impl_->pools.size()) - 1;
}

int BlockStore::add_block(int64_t bytes, int pool, int64_t frozen_bytes) {
  GRAFT_ASSERT(!impl_->allocated && 0 <= frozen_bytes && frozen_bytes <= bytes && pool >= 0 &&
                   pool < static_cast<int>(impl_->pools.size()),
               "block of ", bytes, " bytes, ", frozen_bytes, " frozen, in pool ", pool);
  impl_->blocks.push_back({bytes, frozen_bytes, shard_size(bytes, impl_->comm.size()), pool, {}});
  return num_blocks() - 1;
}

void BlockStore::allocate() {
  GRAFT_ASSERT(!impl_->allocated, "allocated twice");
  impl_->allocated = true;
  std::vector<int64_t> largest(impl_->pools.size(), 0);
  for (Block& block : impl_->blocks) {
    block.shard = at::zeros({block.shard_bytes}, impl_->options);
    largest[block.pool] = std::max(largest[block.pool], block.shard_bytes);
  }
  if (!impl_->sharded()) return;
  for (size_t p = 0; p < impl_->pools.size(); ++p) {
    for (Buffer& buffer : impl_->pools[p].buffers) {
      buffer.bytes = at::empty({largest[p] * impl_->comm.size()}, impl_->options);
    }
  }
}

void BlockStore::write(int block, int64_t offset, const at::Tensor& bytes) {
  GRAFT_ASSERT(impl_->allocated && bytes.scalar_type() == at::kByte && bytes.dim() == 1,
               "write of ", bytes.toString(), " ", bytes.sizes(), " to block ", block);
  Block& target = impl_->at(block);
  GRAFT_ASSERT(target.buffer < 0, "block ", block, " is written after it was gathered");
  const int64_t shard_begin = impl_->comm.rank() * target.shard_bytes;
  for (const Piece& piece : pieces(block, offset, bytes.numel())) {
    if (piece.rank != impl_->comm.rank()) continue;
    const int64_t length = piece.end - piece.begin;
    target.shard.narrow(0, piece.begin - shard_begin, length)
        .copy_(bytes.narrow(0, piece.begin - offset, length));
  }
}

void BlockStore::scatter(int block, int64_t offset, int64_t bytes, const at::Tensor& payload,
                         int owner) {
  const bool owns = rank() == owner;
  GRAFT_ASSERT(!owns || payload.numel() == bytes, "block ", block, ": ", payload.numel(),
               " bytes for ", bytes);
  if (owns) write(block, offset, payload);
  const Block& target = impl_->at(block);
  for (const Piece& piece : pieces(block, offset, bytes)) {
    const int64_t length = piece.end - piece.begin;
    if (piece.rank == owner) continue;
    if (owns) {
      const at::Tensor part =
          payload.narrow(0, piece.begin - offset, length).to(target.shard.device());
      impl_->comm.send(part.contiguous(), piece.rank, Traffic::kControl);
    } else if (piece.rank == rank()) {
      at::Tensor part = target.shard.narrow(0, piece.begin - rank() * target.shard_bytes, length);
      impl_->comm.recv(part, owner, Traffic::kControl);
    }
  }
}

std::vector<BlockStore::Piece> BlockStore::pieces(int block, int64_t offset, int64_t bytes) const {
  impl_->check_range(block, offset, bytes);
  return shard_pieces(impl_->at(block).shard_bytes, offset, offset + bytes);
}

at::Tensor BlockStore::own(int block, int64_t offset, int64_t bytes) {
  const int64_t shard_begin = impl_->comm.rank() * impl_->at(block).shard_bytes;
  for (const Piece& piece : pieces(block, offset, bytes)) {
    if (piece.rank == impl_->comm.rank())
      return impl_->at(block).shard.narrow(0, piece.begin - shard_begin, piece.end - piece.begin);
  }
  return at::empty({0}, impl_->options);
}

void BlockStore::changed(int block) {
  Block& written = impl_->at(block);
  GRAFT_ASSERT(written.num_pins == 0 && !written.gather, "block ", block,
               " was written while it was in use");
  if (written.buffer >= 0) impl_->pools[written.pool].buffers[written.buffer].block = -1;
  written.buffer = -1;
}

at::Tensor BlockStore::collect(const at::Tensor& mine, std::span<const int64_t> sizes) const {
  Comm& comm = impl_->comm;
  std::vector<at::Tensor> parts;
  for (int r = 0; r < comm.size(); ++r) {
    if (sizes[r] == 0) continue;
    if (r == comm.rank() && r != 0) comm.send(mine, 0, Traffic::kControl);
    if (comm.rank() != 0) continue;
    at::Tensor part = r == 0 ? mine : at::empty({sizes[r]}, mine.options());
    if (r != 0) comm.recv(part, r, Traffic::kControl);
    parts.push_back(part);
  }
  return comm.rank() == 0 ? at::cat(parts) : at::Tensor();
}

void BlockStore::pin(int block, int next) {
  GRAFT_ASSERT(impl_->allocated, "block ", block, " is pinned before allocate()");
  Block& pinned = impl_->at(block);
  if (impl_->sharded()) {
    impl_->start_gather(block);
    if (pinned.gather) pinned.gather->wait();
    pinned.gather.reset();
  }
  ++pinned.num_pins;
  if (impl_->sharded() && next >= 0) impl_->start_gather(next);
}

void BlockStore::unpin(int block) {
  Block& pinned = impl_->at(block);
  GRAFT_ASSERT(pinned.num_pins > 0, "block ", block, " is unpinned but was not pinned");
  --pinned.num_pins;
}

at::Tensor BlockStore::bytes(int block, int64_t offset, int64_t bytes) const {
  impl_->check_range(block, offset, bytes);
  const Block& wanted = impl_->at(block);
  GRAFT_ASSERT(wanted.num_pins > 0, "block ", block, " is read but not pinned");
  const at::Tensor& whole =
      impl_->sharded() ? impl_->pools[wanted.pool].buffers[wanted.buffer].bytes : wanted.shard;
  return whole.narrow(0, offset, bytes);
}

int BlockStore::rank() const { return impl_->comm.rank(); }
int BlockStore::world() const { return impl_->comm.size(); }
at::Device BlockStore::device() const { return impl_->options.device(); }
int BlockStore::num_blocks() const { return static_cast<int>(impl_->blocks.size()); }
int64_t BlockStore::block_bytes(int block) const { return impl_->at(block).bytes; }
int64_t BlockStore::shard_bytes(int block) const { return impl_->at(block).shard_bytes; }

int64_t BlockStore::resident_bytes() const {
  int64_t total = 0;
  for (const Block& block : impl_->blocks) total += block.shard.defined() ? block.shard_bytes : 0;
  for (const Pool& pool : impl_->pools) {
    for (const Buffer& buffer : pool.buffers)
      total += buffer.bytes.defined() ? buffer.bytes.numel() : 0;
  }
  return total;
}

std::string BlockStore::hash() const {
  Comm& comm = impl_->comm;
  HashState hash;
  for (const Block& block : impl_->blocks) {
    for (const Piece& piece : shard_pieces(block.shard_bytes, 0, block.frozen_bytes)) {
      at::Tensor shard = block.shard;
      if (piece.rank != 0 && comm.rank() == piece.rank) comm.send(shard, 0, Traffic::kControl);
      if (comm.rank() != 0) continue;
      if (piece.rank != 0) {
        shard = at::empty_like(block.shard);
        comm.recv(shard, piece.rank, Traffic::kControl);
      }
      shard = shard.cpu();
      XXH3_128bits_update(hash.state.get(), shard.const_data_ptr(), piece.end - piece.begin);
    }
  }
  XXH128_canonical_t canonical;
  XXH128_canonicalFromHash(&canonical, XXH3_128bits_digest(hash.state.get()));
  at::Tensor digest = at::from_blob(canonical.digest, {sizeof canonical.digest}, at::kByte)
                          .to(impl_->options, false, true);
  comm.broadcast(digest, 0, Traffic::kControl);
  return to_hex(digest.cpu());
}

}  // namespace graft::dist
