# Follows "Add a method in five steps" of peft/README.md with methods/example.cpp, to the letter: the files are those that
# the page names. They lie in a folder that is laid over the source tree: the folder's three files and the tree's own make
# the program that five_steps_test runs, so the test fails as soon as a method needs a fourth.
set(FIVE_STEPS ${CMAKE_CURRENT_BINARY_DIR}/five_steps)
set(FIVE_STEPS_NAME followed)
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/peft/README.md
  ${PROJECT_SOURCE_DIR}/peft/methods.def ${PROJECT_SOURCE_DIR}/peft/methods/example.cpp)

# What the page says of a step, by its word; `pattern` catches the file it names.
function(five_steps_file step pattern out)
  file(READ ${PROJECT_SOURCE_DIR}/peft/README.md page)
  string(REGEX MATCH "[1-5]\\. \\*\\*${step}\\*\\* ${pattern}" found "${page}")
  if(NOT found)
    message(FATAL_ERROR "peft/README.md: step \"${step}\" no longer says ${pattern}; follow the new words in five_steps.cmake")
  endif()
  string(REPLACE "<group>" reparam file "${CMAKE_MATCH_1}")
  string(REPLACE "<name>" ${FIVE_STEPS_NAME} file "${file}")
  set(${out} ${file} PARENT_SCOPE)
endfunction()

# Writes a file of the folder, if it is not there as it is.
function(five_steps_write file content)
  file(WRITE ${FIVE_STEPS}/new "${content}")
  get_filename_component(folder ${FIVE_STEPS}/${file} DIRECTORY)
  file(MAKE_DIRECTORY ${folder})
  file(COPY_FILE ${FIVE_STEPS}/new ${FIVE_STEPS}/${file} ONLY_IF_DIFFERENT)
  file(REMOVE ${FIVE_STEPS}/new)
endfunction()

five_steps_file(Write "`([^`]+)`\\. Copy `methods/example\\.cpp`" source)
five_steps_file(Register "it: one line in `([^`]+)`, `METHOD\\(name, group, \"arXiv:\\.\\.\\.\", \"the formula\"\\)`" manifest)
five_steps_file(Show "it: `([^`]+)`, `method: <name>` and every field with its default" preset)

file(REMOVE_RECURSE ${FIVE_STEPS}/configs)
file(MAKE_DIRECTORY ${FIVE_STEPS}/configs/methods)
file(CREATE_LINK ${PROJECT_SOURCE_DIR}/configs/models ${FIVE_STEPS}/configs/models SYMBOLIC)
file(GLOB others RELATIVE ${PROJECT_SOURCE_DIR}/configs/methods CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/configs/methods/*.yaml)
foreach(other ${others})
  file(CREATE_LINK ${PROJECT_SOURCE_DIR}/configs/methods/${other} ${FIVE_STEPS}/configs/methods/${other} SYMBOLIC)
endforeach()

file(READ ${PROJECT_SOURCE_DIR}/peft/methods/example.cpp text)
string(REPLACE register_example register_${FIVE_STEPS_NAME} text "${text}")
string(REPLACE Example Followed text "${text}")  # file-local names begin with the method's
five_steps_write(peft/${source} "${text}")
file(READ ${PROJECT_SOURCE_DIR}/peft/methods.def text)
five_steps_write(peft/${manifest} "${text}METHOD(${FIVE_STEPS_NAME}, reparam, \"arXiv:2205.05638\", \"y = l * (W x + b)\")\n")
five_steps_write(${preset} "# y = l * (W x + b).  Liu et al. 2022, arXiv:2205.05638
method: ${FIVE_STEPS_NAME}
target_modules: [attn.q, attn.v]
exclude_modules: []
layers_to_transform: []
initial_factor: 1.0
modules_to_save: []
")

# CMake reads the manifest of the folder as peft/CMakeLists.txt reads the tree's.
graft_method_sources(${FIVE_STEPS}/peft/methods.def sources)
if(NOT ${source} IN_LIST sources)
  message(FATAL_ERROR "peft/CMakeLists.txt does not find ${source} in the manifest")
endif()
graft_test(five_steps_test TORCH
  SOURCES contract_test.cpp five_steps_test.cpp preset_test.cpp ${PROJECT_SOURCE_DIR}/peft/methods/example.cpp
    ${PROJECT_SOURCE_DIR}/peft/catalog.cpp ${FIVE_STEPS}/peft/${source}
  DEPENDS graft::launcher LABELS cpu slow
  ARGS --gtest_filter=FiveSteps*:Presets*:*Contract*${FIVE_STEPS_NAME}*:*Fields*${FIVE_STEPS_NAME}*)
target_include_directories(five_steps_test BEFORE PRIVATE ${FIVE_STEPS})
set_property(TARGET five_steps_test PROPERTY COMPILE_DEFINITIONS
  "GRAFT_SOURCE_DIR=\"${FIVE_STEPS}\";GRAFT_FOLLOWED=\"${FIVE_STEPS_NAME}\"")
