// Weight: a matrix or vector of the base behind one handle, whatever its storage: dense, 4-bit or
// 8-bit, local or sharded. The bytes live in a BlockStore; dense() rebuilds the tensor from the
// pinned block each time it is asked, so neither autograd nor a model ever holds a dense copy for
// longer than the block's pin. A thawed weight is trained where it lies (storage class S): every
// rank keeps a float32 master of the elements whose bytes it owns, the block holds all of them in
// the compute dtype, and a leaf without memory stands for the tensor in autograd's graph.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "dist/block_store.h"
#include "kernels/nf4/nf4.h"

namespace graft::models {

using at::Tensor;

/// What a tensor is used for, which decides how it may be stored.
enum class WeightUse {
  kMatrix,  ///< a block's linear: quantised when the run says so
  kTable,   ///< embedding or head: dense
  kVector,  ///< norm or bias: dense; dense() returns a copy, so autograd may keep it
};

/// How a weight's bytes are laid out in its block.
struct WeightFormat {
  enum class Kind { kDense, kNf4, kFp4, kInt8 };
  Kind kind = Kind::kDense;
  bool nested = false;  ///< 4-bit: absmax itself in 8 bits (double quantisation)
  at::ScalarType dtype = at::ScalarType::Float;  ///< dense only

  bool is_four_bit() const { return kind == Kind::kNf4 || kind == Kind::kFp4; }
  /// Of a four-bit kind.
  kernels::FourBitType four_bit_type() const {
    return kind == Kind::kNf4 ? kernels::FourBitType::kNf4 : kernels::FourBitType::kFp4;
  }
  std::string name() const;
};

/// What may write a weight once it is loaded. All but kNothing store it dense.
enum class Thaw {
  kNothing,  ///< frozen
  kFile,     ///< a saved adapter's tensor takes its place, once
  kSteps,    ///< the optimiser: it is trained
};

/// Elements [begin, end) of a tensor in row-major order.
struct ElementRange {
  int64_t begin = 0, end = 0;
  int64_t size() const { return end - begin; }
};

class Weight {
 public:
  Weight() = default;
  Weight(std::vector<int64_t> shape, WeightUse use) : shape_(std::move(shape)), use_(use) {}

  bool defined() const { return !shape_.empty(); }
  const std::vector<int64_t>& shape() const { return shape_; }
  WeightUse use() const { return use_; }
  int64_t numel() const;

  /// The tensor in the compute dtype, on the store's device. The block must be pinned.
  /// A matrix may be a view into the gather buffer: use it now, never save it for backward.
  Tensor dense() const;
  /// As dense(), in memory of its own: autograd may keep it.
  Tensor dense_to_keep() const;
  /// A vector as dense(), in the graph of a trained weight.
  Tensor value() const;
  /// Rows `ids` [...] of a dense table [V, D] -> [..., D] in the compute dtype, without touching
  /// the others.
  Tensor rows(const Tensor& ids) const;
  /// Between keep() and drop() dense() makes its copy once: all lanes of a pin share it.
  void keep() const { kept_ = true; }
  void drop() const;

  // --- thawed ----------------------------------------------------------------------------------
  /// Before the weight is loaded.
  void thaw(Thaw by) { thaw_ = by; }
  Thaw thawed() const { return thaw_; }
  bool is_trained() const { return thaw_ == Thaw::kSteps; }
  bool is_loaded() const { return store_ != nullptr; }
  /// Stands for the weight in autograd's graph: a float32 leaf of its shape that has no memory.
  /// Undefined unless it is trained and loaded.
  const Tensor& leaf() const { return leaf_; }
  /// The elements of each rank of the shard group; all of them where the base is replicated.
  std::vector<ElementRange> ranges() const;
  ElementRange own_range() const;
  /// The float32 values of own_range(), to be written in place; publish() then puts them into the
  /// block, on every rank. Of a weight that is stored in float32 they are the block's own bytes.
  const Tensor& master();
  void publish();
  /// The whole tensor in float32 on rank 0, undefined on others. Collective.
  Tensor collect();

  // --- filled by the loader --------------------------------------------------------------------
  /// Fixes format and compute dtype. @return the bytes it will take in its block
  int64_t set_format(WeightFormat format, at::ScalarType compute_dtype);
  void place(dist::BlockStore& store, int block, int64_t offset);
  const WeightFormat& format() const { return format_; }
  int block() const { return block_; }
  int64_t offset() const { return offset_; }
  int64_t payload_bytes() const { return payload_bytes_; }
  /// The bytes of a dense tensor in this weight's format, uint8 [payload_bytes()], on the CPU:
  /// quantises.
  Tensor encode(const Tensor& dense) const;
  /// The same of a matrix that is 4-bit already, in this very format: its codes are kept as they
  /// are.
  Tensor encode(const kernels::FourBitCodes& codes) const;
  /// What dense() gives once encode(dense) is stored; on the CPU.
  Tensor round_trip(const Tensor& dense) const;

 private:
  /// Where the parts of a payload begin: codes, scales, second-level scales, second-level offset,
  /// end.
  struct Parts {
    int64_t scales, nested, offset, end;
  };
  Parts parts() const;
  Tensor bytes(int64_t begin, int64_t end) const;
  /// The tensor of a payload. @param bytes  gives a range of it
  using Bytes = std::function<Tensor(int64_t begin, int64_t end)>;
  Tensor rebuild(const Bytes& bytes, std::optional<float>& nested_offset) const;
  Tensor own_bytes() const { return store_->own(block_, offset_, payload_bytes_); }

  std::vector<int64_t> shape_;
  WeightUse use_ = WeightUse::kMatrix;
  WeightFormat format_;
  at::ScalarType compute_dtype_ = at::ScalarType::Float;
  Thaw thaw_ = Thaw::kNothing;
  Tensor leaf_, master_;
  dist::BlockStore* store_ = nullptr;
  int block_ = -1;
  int64_t offset_ = 0, payload_bytes_ = 0;
  mutable bool kept_ = false;
  mutable Tensor kept_copy_;
  mutable std::optional<float> nested_offset_;
};

}  // namespace graft::models
