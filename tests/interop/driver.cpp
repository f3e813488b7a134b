// Writes llama.cpp's logits for given tokens, and for a greedy continuation of them.
//
// usage: driver MODEL IDS OUT N_GENERATE N_THREADS [ADAPTER SCALE]
//
// IDS holds int32 token ids. OUT receives float32 rows of n_vocab logits, one after each token of
// IDS and of the continuation, whose tokens are the largest entries of the rows from the last one
// of IDS on. The last generated token is not evaluated: n_ids + N_GENERATE - 1 rows in all.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <vector>

#include "llama.h"

namespace {

[[noreturn]] void fail(const char* message) {
  std::fprintf(stderr, "driver: %s\n", message);
  std::exit(1);
}

std::vector<llama_token> read_ids(const char* path) {
  std::ifstream file(path, std::ios::binary);
  std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  const auto* ids = reinterpret_cast<const llama_token*>(bytes.data());
  return {ids, ids + bytes.size() / sizeof(llama_token)};
}

// Evaluates tokens from position `past` on and appends their rows to `out`.
// Returns the likeliest next token.
llama_token evaluate(llama_context* context, const std::vector<llama_token>& tokens, int past,
                     int n_vocab, std::ofstream& out) {
  const int count = static_cast<int>(tokens.size());
  llama_batch batch = llama_batch_init(count, 0, 1);
  batch.n_tokens = count;
  for (int i = 0; i < count; i++) {
    batch.token[i] = tokens[i];
    batch.pos[i] = past + i;
    batch.n_seq_id[i] = 1;
    batch.seq_id[i][0] = 0;
    batch.logits[i] = 1;
  }
  if (llama_decode(context, batch) != 0) fail("llama_decode failed");
  const float* row = nullptr;
  for (int i = 0; i < count; i++) {
    row = llama_get_logits_ith(context, i);
    out.write(reinterpret_cast<const char*>(row), sizeof(float) * n_vocab);
  }
  llama_batch_free(batch);
  return static_cast<llama_token>(std::max_element(row, row + n_vocab) - row);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 6 && argc != 8) {
    fail("usage: driver MODEL IDS OUT N_GENERATE N_THREADS [ADAPTER SCALE]");
  }
  llama_log_set(
      [](ggml_log_level level, const char* text, void*) {
        if (level == GGML_LOG_LEVEL_ERROR) std::fputs(text, stderr);
      },
      nullptr);
  const std::vector<llama_token> ids = read_ids(argv[2]);
  const int n_generate = std::atoi(argv[4]);
  llama_backend_init();
  llama_model_params options = llama_model_default_params();
  // On processors with AMX the repacked weights of experts have no product, and it aborts.
  options.use_extra_bufts = false;
  llama_model* model = llama_model_load_from_file(argv[1], options);
  if (model == nullptr) fail("cannot load the model");
  llama_context_params params = llama_context_default_params();
  params.n_ctx = static_cast<uint32_t>(ids.size() + n_generate);
  params.n_batch = params.n_ctx;
  params.n_threads = params.n_threads_batch = std::atoi(argv[5]);
  llama_context* context = llama_init_from_model(model, params);
  if (context == nullptr) fail("cannot create a context");
  if (argc == 8) {
    llama_adapter_lora* adapter = llama_adapter_lora_init(model, argv[6]);
    if (adapter == nullptr) fail("cannot load the adapter");
    float scale = static_cast<float>(std::atof(argv[7]));
    if (llama_set_adapters_lora(context, &adapter, 1, &scale) != 0) fail("cannot use the adapter");
  }
  const int n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
  std::ofstream out(argv[3], std::ios::binary);

  int past = static_cast<int>(ids.size());
  llama_token next = evaluate(context, ids, 0, n_vocab, out);
  for (int i = 1; i < n_generate; i++) next = evaluate(context, {next}, past++, n_vocab, out);

  llama_free(context);
  llama_model_free(model);
  return out.good() ? 0 : 1;
}
