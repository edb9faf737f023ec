// libFuzzer target: any bytes, read as a run configuration, are either refused with an error of
// ours or accepted; what is accepted dumps to text that reads back to the same dump.
#include <cstdint>
#include <cstdlib>
#include <string>

#include "configs/check.h"
#include "launcher/run_config.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using graft::launcher::RunConfig;
  const std::string text(reinterpret_cast<const char*>(data), size);
  std::string dumped;
  try {
    dumped = graft::configs::dump(graft::configs::read_text<RunConfig>(text, "fuzz"));
  } catch (const graft::Error& error) {
    if (error.code() != graft::ExitCode::kUsage) std::abort();
    return 0;
  }
  // Outside the try: a dump that is refused is a bug, and the exception ends the fuzzer.
  if (graft::configs::dump(graft::configs::read_text<RunConfig>(dumped, "dump")) != dumped) {
    std::abort();
  }
  return 0;
}
