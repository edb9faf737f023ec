// Stop signals: USR1, USR2, TERM and Ctrl-C ask a training run to end after its step. No handler
// runs on any thread: the compiled kernels of LibTorch's oneDNN use memory beyond the stack
// pointer, which a handler's frame would overwrite (seen as heap corruption). The signals are
// blocked in every thread, and one thread waits for them.
#pragma once

namespace graft::launcher {

/// From now on the signals do not end the process. Before any other thread starts.
void watch_stop_signals();
/// A run that has steps to save has begun: until then Ctrl-C ends the process at once; afterwards
/// the second one does.
void save_before_stopping();
/// Whether a stop was asked for.
bool stop_requested();

}  // namespace graft::launcher
