#include "models/io/bitsandbytes.h"

#include <ATen/ATen.h>

#include <cmath>
#include <nlohmann/json.hpp>
#include <set>

#include "configs/check.h"
#include "kernels/nf4/code_books.h"
#include "kernels/nf4/nf4.h"
#include "models/io/json_file.h"

namespace graft::models::io {
namespace {

using nlohmann::json;

constexpr std::string_view kStateMark = ".quant_state.bitsandbytes__";

kernels::FourBitType kernel_type(const std::string& quant_type) {
  return quant_type == "nf4" ? kernels::FourBitType::kNf4 : kernels::FourBitType::kFp4;
}

at::ScalarType matrix_dtype(const json& state, const std::string& where) {
  const json name = state.value("dtype", json());
  if (name == "float32") return at::kFloat;
  if (name == "bfloat16") return at::kBFloat16;
  GRAFT_CHECK(name == "float16", ExitCode::kData, where, ": dtype ", name.dump(),
              "; expected float32, bfloat16 or float16");
  return at::kHalf;
}

std::vector<int64_t> matrix_shape(const json& state, const std::string& where) {
  const json shape = state.value("shape", json());
  GRAFT_CHECK(shape.is_array() && shape.size() == 2, ExitCode::kData, where, ": shape ",
              shape.dump(), "; expected [out, in]");
  for (const json& size : shape) {
    GRAFT_CHECK(
        size.is_number_unsigned() && size.get<uint64_t>() >= 1 && size.get<uint64_t>() < (1u << 30),
        ExitCode::kData, where, ": shape ", shape.dump(), " is out of range");
  }
  return shape.get<std::vector<int64_t>>();
}

/// A part with `elems` elements in one dimension, as float32 if it is of one of the dtypes.
at::Tensor check_part(const at::Tensor& part, int64_t elems, at::ArrayRef<at::ScalarType> dtypes,
                      const std::string& where) {
  GRAFT_CHECK(part.dim() == 1 && part.numel() == elems, ExitCode::kData, where, ": shape ",
              part.sizes(), ", expected [", elems,
              "]; a two-dimensional absmax comes from saving after an inference: save the "
              "model right after quantising it");
  for (at::ScalarType dtype : dtypes) {
    if (part.scalar_type() == dtype) return part;
  }
  throw Error(ExitCode::kData, detail::concat(where, ": dtype ", c10::toString(part.scalar_type()),
                                              " is not one bitsandbytes writes here"));
}

}  // namespace

QuantState parse_quant_state(std::string_view text, std::string_view part,
                             const std::string& where) {
  static const std::set<std::string> kKeys = {"quant_type",   "blocksize",        "dtype",
                                              "shape",        "nested_blocksize", "nested_dtype",
                                              "nested_offset"};
  const json state = parse_json(text, where);
  GRAFT_CHECK(state.is_object(), ExitCode::kData, where, ": expected a JSON object");
  for (const auto& [key, value] : state.items()) {
    GRAFT_CHECK(kKeys.contains(key), ExitCode::kData, where, ": unknown key '", key, "'");
  }
  QuantState result;
  result.quant_type = part.substr(part.rfind('_') + 1);
  GRAFT_CHECK(result.quant_type == "nf4" || result.quant_type == "fp4", ExitCode::kData, where,
              ": quantisation '", result.quant_type, "' is not supported (nf4 and fp4 are)");
  GRAFT_CHECK(state.value("quant_type", json()) == result.quant_type, ExitCode::kData, where,
              ": quant_type disagrees with the tensor's name");
  GRAFT_CHECK(state.value("blocksize", json()) == kernels::kBlockElems, ExitCode::kData, where,
              ": blocksize ", state.value("blocksize", json()).dump(), " is not supported (64 is)");
  result.dtype = matrix_dtype(state, where);
  result.shape = matrix_shape(state, where);
  result.nested = state.contains("nested_offset");
  GRAFT_CHECK(state.contains("nested_blocksize") == result.nested &&
                  state.contains("nested_dtype") == result.nested,
              ExitCode::kData, where, ": has some nested_ keys but not all");
  if (result.nested) {
    GRAFT_CHECK(state["nested_blocksize"] == kernels::kNestedBlockElems, ExitCode::kData, where,
                ": nested_blocksize ", state["nested_blocksize"].dump(),
                " is not supported (256 is)");
    GRAFT_CHECK(state["nested_dtype"] == "float32" || state["nested_dtype"] == "bfloat16",
                ExitCode::kData, where, ": nested_dtype ", state["nested_dtype"].dump(),
                "; expected float32 or bfloat16");
    GRAFT_CHECK(state["nested_offset"].is_number(), ExitCode::kData, where,
                ": nested_offset must be a number");
    result.nested_offset = state["nested_offset"].get<float>();
    GRAFT_CHECK(std::isfinite(result.nested_offset), ExitCode::kData, where,
                ": nested_offset is too large");
  }
  return result;
}

std::string_view quant_state_owner(std::string_view part) {
  const size_t mark = part.rfind(kStateMark);
  return mark == std::string_view::npos ? std::string_view() : part.substr(0, mark);
}

std::vector<std::string> four_bit_parts(const std::string& name, const QuantState& state) {
  std::vector<std::string> parts = {name, name + ".absmax", name + ".quant_map"};
  if (state.nested)
    parts.insert(parts.end(), {name + ".nested_absmax", name + ".nested_quant_map"});
  return parts;
}

FourBit read_four_bit_matrix(const std::string& name, const QuantState& state,
                             const std::string& where,
                             const std::function<at::Tensor(const std::string&)>& read_part) {
  const int64_t elems = state.shape[0] * state.shape[1];
  const int64_t blocks = kernels::blocks_of(elems, kernels::kBlockElems);
  const auto part = [&](const char* suffix, int64_t size, at::ArrayRef<at::ScalarType> dtypes) {
    return check_part(read_part(name + suffix), size, dtypes, where + suffix);
  };
  FourBit matrix;
  matrix.quant_type = state.quant_type;
  matrix.shape = state.shape;
  matrix.codes = read_part(name).flatten().view(at::kByte);
  GRAFT_CHECK(matrix.codes.numel() == (elems + 1) / 2, ExitCode::kData, where, ": ",
              matrix.codes.numel(), " bytes of codes, expected ", (elems + 1) / 2, " for ",
              state.shape[0], " x ", state.shape[1]);
  matrix.absmax = part(".absmax", blocks, {state.nested ? at::kByte : at::kFloat});
  GRAFT_CHECK(
      kernels::four_bit_type(part(".quant_map", 16, {at::kFloat})) == kernel_type(state.quant_type),
      ExitCode::kData, where, ".quant_map: not the code book of ", state.quant_type);
  if (state.nested) {
    // CPU re-saves write the second level in bfloat16; every consumer wants float32.
    const int64_t groups = kernels::blocks_of(blocks, kernels::kNestedBlockElems);
    matrix.nested_absmax =
        part(".nested_absmax", groups, {at::kFloat, at::kBFloat16}).to(at::kFloat);
    matrix.nested_code = part(".nested_quant_map", 256, {at::kFloat, at::kBFloat16}).to(at::kFloat);
    matrix.nested_offset = state.nested_offset;
  }
  return matrix;
}

std::vector<std::pair<std::string, at::Tensor>> four_bit_tensors(const std::string& name,
                                                                 const kernels::FourBitCodes& codes,
                                                                 at::IntArrayRef shape,
                                                                 at::ScalarType dtype) {
  const bool nf4 = codes.type == kernels::FourBitType::kNf4;
  const std::string type = nf4 ? "nf4" : "fp4";
  json state{{"quant_type", type},
             {"blocksize", kernels::kBlockElems},
             {"dtype", dtype == at::kBFloat16 ? "bfloat16"
                       : dtype == at::kHalf   ? "float16"
                                              : "float32"},
             {"shape", shape.vec()}};
  const auto& values = nf4 ? kernels::kNf4Book.values : kernels::kFp4Book.values;
  std::vector<std::pair<std::string, at::Tensor>> tensors = {
      {name, codes.codes.view({-1, 1})},
      {name + ".absmax", codes.absmax},
      {name + ".quant_map", at::tensor(at::ArrayRef<float>(values))}};
  if (codes.nested_absmax.defined()) {
    state.update({{"nested_blocksize", kernels::kNestedBlockElems},
                  {"nested_dtype", "float32"},
                  {"nested_offset", codes.nested_offset}});
    tensors.emplace_back(name + ".nested_absmax", codes.nested_absmax);
    tensors.emplace_back(name + ".nested_quant_map", kernels::dynamic_map());
  }
  const std::string text = state.dump();
  const std::vector<uint8_t> bytes(text.begin(), text.end());
  tensors.emplace_back(name + std::string(kStateMark) + type, at::tensor(bytes, at::kByte));
  return tensors;
}

at::Tensor dequantize(const FourBit& matrix, at::ScalarType dtype) {
  at::Tensor dense = at::empty(matrix.shape, dtype);
  kernels::dequantize({kernel_type(matrix.quant_type), matrix.codes, matrix.absmax,
                       matrix.nested_absmax, matrix.nested_offset, matrix.nested_code},
                      dense);
  return dense;
}

}  // namespace graft::models::io
