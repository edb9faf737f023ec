#include "models/weight.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include <cstring>

#include "configs/check.h"
#include "kernels/int8/int8.h"
#include "kernels/nf4/code_books.h"

namespace graft::models {
namespace {

using Kind = WeightFormat::Kind;

constexpr int64_t kAlignment =
    64;  // of the parts of a payload: a cache line, and more than any dtype needs

int64_t align(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

/// Copies a tensor's bytes into a payload.
void put(const Tensor& payload, int64_t at, const Tensor& part) {
  const Tensor source = part.contiguous();
  std::memcpy(payload.mutable_data_ptr<uint8_t>() + at, source.const_data_ptr(), source.nbytes());
}

/// The values of a vector, whose gradient is its leaf's.
struct InGraph : torch::autograd::Function<InGraph> {
  static Tensor forward(torch::autograd::AutogradContext*, const Tensor& /*leaf*/,
                        const Weight* weight) {
    return weight->dense().clone();  // the lanes of a pin share one copy, a graph wants its own
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext*,
                                                 torch::autograd::variable_list d) {
    return {d[0], Tensor()};
  }
};

}  // namespace

std::string WeightFormat::name() const {
  switch (kind) {
    case Kind::kNf4:
      return nested ? "nf4 (double quantised)" : "nf4";
    case Kind::kFp4:
      return nested ? "fp4 (double quantised)" : "fp4";
    case Kind::kInt8:
      return "int8";
    case Kind::kDense:
      return c10::toString(dtype);
  }
  return "unknown";
}

int64_t Weight::numel() const {
  int64_t n = 1;
  for (const int64_t size : shape_) n *= size;
  return n;
}

Weight::Parts Weight::parts() const {
  const int64_t n = numel();
  if (format_.kind == Kind::kDense) {
    const int64_t end = n * static_cast<int64_t>(c10::elementSize(format_.dtype));
    return {end, end, end, end};
  }
  if (format_.kind == Kind::kInt8) {
    const int64_t scales = align(n), end = scales + shape_.front() * 4;
    return {scales, end, end, end};
  }
  const int64_t blocks = kernels::blocks_of(n, kernels::kBlockElems),
                scales = align(kernels::blocks_of(n, 2));
  if (!format_.nested)
    return {scales, scales + blocks * 4, scales + blocks * 4, scales + blocks * 4};
  const int64_t nested = align(scales + blocks);
  const int64_t offset = nested + kernels::blocks_of(blocks, kernels::kNestedBlockElems) * 4;
  return {scales, nested, offset, offset + 4};
}

int64_t Weight::set_format(WeightFormat format, at::ScalarType compute_dtype) {
  format_ = format;
  compute_dtype_ = compute_dtype;
  payload_bytes_ = parts().end;
  return payload_bytes_;
}

void Weight::place(dist::BlockStore& store, int block, int64_t offset) {
  store_ = &store;
  block_ = block;
  offset_ = offset;
  nested_offset_.reset();
  master_ = Tensor();  // of another store
  if (!is_trained()) return;
  const auto options = at::TensorOptions().dtype(at::kFloat).device(store.device());
  leaf_ = at::zeros({1}, options).expand(shape_).set_requires_grad(true);
}

Tensor Weight::encode(const Tensor& dense) const {
  if (format_.is_four_bit()) {
    const auto scales = format_.nested ? kernels::Scales::kNested : kernels::Scales::kPlain;
    const Tensor w = dense.scalar_type() == at::kBFloat16 ? dense : dense.to(at::kFloat);
    return encode(kernels::quantize(w.contiguous(), format_.four_bit_type(), scales));
  }
  Tensor payload = at::zeros({payload_bytes_}, at::kByte);
  if (format_.kind == Kind::kInt8) {
    const auto q = kernels::quantize_int8(dense.to(at::kFloat).contiguous());
    put(payload, 0, q.codes), put(payload, parts().scales, q.absmax);
  } else {
    put(payload, 0, dense.to(format_.dtype));
  }
  return payload;
}

Tensor Weight::encode(const kernels::FourBitCodes& q) const {
  GRAFT_ASSERT(format_.is_four_bit() && q.nested_absmax.defined() == format_.nested,
               format_.name());
  const Parts at_bytes = parts();
  Tensor payload = at::zeros({payload_bytes_}, at::kByte);
  put(payload, 0, q.codes), put(payload, at_bytes.scales, q.absmax);
  if (format_.nested) {
    put(payload, at_bytes.nested, q.nested_absmax);
    std::memcpy(payload.mutable_data_ptr<uint8_t>() + at_bytes.offset, &q.nested_offset,
                sizeof(float));
  }
  return payload;
}

Tensor Weight::bytes(int64_t begin, int64_t end) const {
  return store_->bytes(block_, offset_ + begin, end - begin);
}

Tensor Weight::dense() const {
  if (kept_copy_.defined()) return kept_copy_;
  GRAFT_ASSERT(store_ != nullptr, "weight was not loaded");
  Tensor dense =
      rebuild([this](int64_t begin, int64_t end) { return bytes(begin, end); }, nested_offset_);
  if (kept_) kept_copy_ = dense;
  return dense;
}

void Weight::drop() const {
  kept_ = false;
  kept_copy_ = Tensor();
}

Tensor Weight::dense_to_keep() const {
  const Tensor w = dense();
  return format_.kind == WeightFormat::Kind::kDense ? w.clone() : w;
}

Tensor Weight::value() const {
  GRAFT_ASSERT(use_ == WeightUse::kVector, "a matrix in the graph would outlive its pin");
  return is_trained() ? InGraph::apply(leaf_, this) : dense();
}

std::vector<ElementRange> Weight::ranges() const {
  const auto size = static_cast<int64_t>(c10::elementSize(format_.dtype));
  std::vector<ElementRange> ranges(static_cast<size_t>(store_->world()));
  for (const auto& piece : store_->pieces(block_, offset_, payload_bytes_)) {
    ranges[static_cast<size_t>(piece.rank)] = {(piece.begin - offset_) / size,
                                               (piece.end - offset_) / size};
  }
  return ranges;
}

ElementRange Weight::own_range() const { return ranges()[static_cast<size_t>(store_->rank())]; }

const Tensor& Weight::master() {
  GRAFT_ASSERT(store_ != nullptr && thaw_ != Thaw::kNothing, "the master of a frozen weight");
  if (!master_.defined()) master_ = own_bytes().view(format_.dtype).to(at::kFloat);
  return master_;
}

void Weight::publish() {
  if (format_.dtype != at::kFloat) own_bytes().view(format_.dtype).copy_(master_);
  store_->changed(block_);
}

Tensor Weight::collect() {
  std::vector<int64_t> sizes;
  for (const ElementRange& range : ranges()) sizes.push_back(range.size());
  const Tensor whole = store_->collect(master(), sizes);
  return whole.defined() ? whole.view(shape_) : whole;
}

Tensor Weight::rows(const Tensor& ids) const {
  GRAFT_ASSERT(format_.kind == Kind::kDense, "rows of a table in ", format_.name());
  const Tensor table = bytes(0, payload_bytes_).view(format_.dtype).view(shape_);
  return at::embedding(table, ids).to(compute_dtype_);
}

Tensor Weight::round_trip(const Tensor& dense) const {
  const Tensor payload = encode(dense);
  std::optional<float> nested_offset;
  return rebuild([&](int64_t begin, int64_t end) { return payload.slice(0, begin, end); },
                 nested_offset);
}

Tensor Weight::rebuild(const Bytes& bytes, std::optional<float>& nested_offset) const {
  if (format_.kind == Kind::kDense) {
    const Tensor stored = bytes(0, payload_bytes_).view(format_.dtype).view(shape_);
    return stored.to(compute_dtype_, /*non_blocking=*/false, /*copy=*/use_ == WeightUse::kVector);
  }
  const Parts at_bytes = parts();
  Tensor out =
      at::empty(shape_, at::TensorOptions().dtype(compute_dtype_).device(bytes(0, 0).device()));
  if (format_.kind == Kind::kInt8) {
    kernels::dequantize_int8(
        {bytes(0, numel()).view(at::kChar).view(shape_), bytes(at_bytes.scales, at_bytes.end)},
        out);
    return out;
  }
  kernels::FourBitCodes q;
  q.type = format_.four_bit_type();
  q.codes = bytes(0, kernels::blocks_of(numel(), 2));
  if (format_.nested) {
    q.absmax =
        bytes(at_bytes.scales, at_bytes.scales + kernels::blocks_of(numel(), kernels::kBlockElems));
    q.nested_absmax = bytes(at_bytes.nested, at_bytes.offset);
    // A number the host needs: read once, when the block is first there, so later sweeps do not
    // wait for the device.
    if (!nested_offset)
      nested_offset = bytes(at_bytes.offset, at_bytes.end).view(at::kFloat).item<float>();
    q.nested_offset = *nested_offset;
  } else {
    q.absmax = bytes(at_bytes.scales, at_bytes.end);
  }
  kernels::dequantize(q, out);
  return out;
}

}  // namespace graft::models
