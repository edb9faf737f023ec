// What this build is: version, commit, the libraries it was made with.
#pragma once

#include <string>

namespace graft::launcher {

std::string version_text();  ///< "graft 0.1.0 (1a2b3c4, CPU)"
std::string
source_dir();          ///< where data/prepare and configs are: beside the program's build folder
std::string python();  ///< the interpreter of .venv, else python3

}  // namespace graft::launcher
