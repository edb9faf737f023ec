#include "models/load.h"

#include <ATen/ATen.h>
#include <xxhash.h>

#include <algorithm>
#include <array>

#include "configs/check.h"

namespace graft::models {
namespace {

WeightFormat format_of(const MatchedWeight& item, const LoadOptions& options) {
  using Kind = WeightFormat::Kind;
  if (item.weight->thawed() != Thaw::kNothing) return {Kind::kDense, false, options.compute_dtype};
  if (item.weight->use() == WeightUse::kMatrix && options.quantization != Quantization::kNone) {
    const Kind kind = options.quantization == Quantization::kNf4   ? Kind::kNf4
                      : options.quantization == Quantization::kFp4 ? Kind::kFp4
                                                                   : Kind::kInt8;
    return {kind, kind != Kind::kInt8 && options.double_quantization};
  }
  // Sixteen bits stay sixteen bits: they convert exactly where they are used. All else takes the
  // compute dtype.
  if (item.source->dtype == "BF16") return {Kind::kDense, false, at::kBFloat16};
  if (item.source->dtype == "F16") return {Kind::kDense, false, at::kHalf};
  return {Kind::kDense, false, options.compute_dtype};
}

/// Gives every weight its bytes in the store: in each block those that are trained come last.
void lay_out(const std::vector<MatchedWeight>& items, Model& model, dist::BlockStore& store,
             const LoadOptions& options) {
  constexpr int64_t kAlignment = 64;
  for (const int buffers : model.pools()) store.add_pool(buffers);
  std::vector<int64_t> bytes(static_cast<size_t>(model.num_blocks()), 0);
  const auto place = [&](bool trained) {
    for (const MatchedWeight& item : items) {
      if (item.weight->is_trained() != trained) continue;
      int64_t& end = bytes[static_cast<size_t>(item.block)];
      const int64_t size = item.weight->set_format(format_of(item, options), options.compute_dtype);
      item.weight->place(store, item.block, end);
      end += (size + kAlignment - 1) / kAlignment * kAlignment;
    }
  };
  place(false);
  const std::vector<int64_t> frozen_bytes = bytes;
  place(true);
  for (int b = 0; b < model.num_blocks(); ++b) {
    const auto i = static_cast<size_t>(b);
    store.add_block(bytes[i], model.block(b).pool, frozen_bytes[i]);
  }
  store.allocate();
}

std::string hash_of(const Tensor& bytes) {
  const XXH128_hash_t h = XXH3_128bits(bytes.const_data_ptr(), bytes.nbytes());
  XXH128_canonical_t canonical;
  XXH128_canonicalFromHash(&canonical, h);
  std::string hex;
  for (const unsigned char c : canonical.digest) {
    constexpr std::array<char, 17> kDigits{"0123456789abcdef"};
    hex += {kDigits[c >> 4U], kDigits[c & 15U]};
  }
  return hex;
}

/// The hash of a matrix that the file holds in 4 bits: of its codes and scales, however it will be
/// stored here.
std::string hash_of(const io::FourBit& m) {
  std::vector<Tensor> parts = {m.codes, m.absmax};
  if (m.nested())
    parts.insert(parts.end(), {m.nested_absmax, m.nested_code, at::full({1}, m.nested_offset)});
  for (Tensor& part : parts) part = part.contiguous().flatten().view(at::kByte);
  return hash_of(at::cat(parts));
}

/// The payload of a matrix whose codes the file holds.
Tensor keep_codes(const MatchedWeight& item, const io::FourBit& m, const std::string& where) {
  const WeightFormat& format = item.weight->format();
  const bool same_type = item.source->dtype == (format.kind == WeightFormat::Kind::kNf4   ? "nf4"
                                                : format.kind == WeightFormat::Kind::kFp4 ? "fp4"
                                                                                          : "");
  GRAFT_CHECK(same_type && m.nested() == format.nested, where, ": stored as ", item.source->dtype,
              m.nested() ? " with" : " without", " double quantisation, the run asks for ",
              format.name(), "; set model.quantization: ", item.source->dtype,
              " and model.double_quantization: ", m.nested() ? "true" : "false",
              " to keep the file's codes");
  GRAFT_CHECK(!m.nested() || at::equal(m.nested_code, kernels::dynamic_map()), ExitCode::kData,
              where, ": has a nested_quant_map that is not bitsandbytes' dynamic map");
  return item.weight->encode(kernels::FourBitCodes{
      format.four_bit_type(), m.codes, m.absmax, m.nested_absmax, m.nested_offset, {}});
}

/// The payload of one weight, and the hash of what it came from.
std::pair<Tensor, std::string> read(const MatchedWeight& item, io::TensorSource& source,
                                    int64_t head_dim, const LoadOptions& options) {
  const std::string where = source.describe() + ": " + item.source->name;
  const auto four_bit = source.read_four_bit(item.source->name);
  const bool prepared = options.prepare_weight && item.weight->use() == WeightUse::kMatrix;
  if (four_bit && item.weight->format().kind != WeightFormat::Kind::kDense && !prepared) {
    return {keep_codes(item, *four_bit, where), hash_of(*four_bit)};
  }
  Tensor dense = source.read(item.source->name).contiguous();
  std::string hash = four_bit ? hash_of(*four_bit) : hash_of(dense);
  if (item.transform != Transform::kIdentity) dense = rope_rows_from_gguf(dense, head_dim);
  if (prepared) dense = options.prepare_weight(item.name, dense);
  try {
    return {item.weight->encode(dense), std::move(hash)};
  } catch (const Error& error) {
    throw Error(error.code(), where + ": " + error.what());
  }
}

}  // namespace

std::vector<SourceHash> load_weights(Model& model, dist::BlockStore& store,
                                     io::TensorSource& source, const LoadOptions& options) {
  const std::vector<MatchedWeight> items = match_weights(model, source);
  lay_out(items, model, store, options);
  int64_t done = 0, total = 0;
  for (const MatchedWeight& item : items) total += item.source->file_bytes;
  std::vector<SourceHash> hashes;
  // In rounds of one tensor a rank: all ranks read and quantise at once, then send in turn.
  const auto world = static_cast<size_t>(store.world());
  for (size_t first = 0; first < items.size(); first += world) {
    Tensor mine;
    const size_t own = first + static_cast<size_t>(store.rank());
    if (own < items.size()) {
      auto [payload, hash] = read(items[own], source, model.info().head_dim, options);
      mine = std::move(payload);
      const bool is_of_the_base = items[own].source->file_bytes > 0;  // a new head is not
      if (is_of_the_base) hashes.push_back({items[own].source->name, std::move(hash)});
    }
    for (size_t i = first; i < std::min(first + world, items.size()); ++i) {
      const Weight& w = *items[i].weight;
      store.scatter(w.block(), w.offset(), w.payload_bytes(), i == own ? mine : Tensor(),
                    static_cast<int>(i - first));
      done += items[i].source->file_bytes;
    }
    if (options.progress) options.progress(done, total);
  }
  return hashes;
}

bool holds_four_bit(const io::TensorSource& source) {
  const auto& all = source.tensors();
  return std::any_of(all.begin(), all.end(), [](const io::SourceTensor& tensor) {
    return tensor.dtype == "nf4" || tensor.dtype == "fp4";
  });
}

Tensor read_matrix(const MatchedWeight& item, io::TensorSource& source, int64_t head_dim) {
  GRAFT_CHECK(!source.read_four_bit(item.source->name), source.describe(), ": ", item.source->name,
              " is stored in four bits; first values that come from the base's matrices need it as "
              "it was before (model.name_or_path: the unquantised model, with "
              "model.quantization: nf4)");
  const Tensor w = source.read(item.source->name).contiguous();
  return item.transform == Transform::kIdentity ? w : rope_rows_from_gguf(w, head_dim);
}

Tensor stored(const MatchedWeight& item, const Tensor& w, const LoadOptions& options) {
  Weight weight(item.weight->shape(), item.weight->use());
  weight.set_format(format_of(item, options), options.compute_dtype);
  return weight.round_trip(w);
}

std::string fingerprint(io::TensorSource& source, const std::vector<MatchedWeight>& weights) {
  std::vector<SourceHash> hashes;
  for (const MatchedWeight& w : weights) {
    const std::string& name = w.source->name;
    const auto four_bit = source.read_four_bit(name);
    hashes.push_back(
        {name, four_bit ? hash_of(*four_bit) : hash_of(source.read(name).contiguous())});
  }
  return fingerprint(std::move(hashes));
}

std::string fingerprint(std::vector<SourceHash> hashes) {
  std::sort(hashes.begin(), hashes.end(),
            [](const SourceHash& a, const SourceHash& b) { return a.name < b.name; });
  std::string text;
  for (const SourceHash& h : hashes) text += h.name + " " + h.hash + "\n";
  return hash_of(at::from_blob(text.data(), {static_cast<int64_t>(text.size())}, at::kByte));
}

}  // namespace graft::models
