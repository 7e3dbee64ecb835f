-- Schema version 1, as it was first published; never edited, since databases were made by it.

CREATE TABLE runs (
    "run_id" VARCHAR,
    "plan_hash" VARCHAR,
    "started_at" TIMESTAMP,
    "finished_at" TIMESTAMP,
    "status" VARCHAR,
    "command" VARCHAR,
    "host_key" VARCHAR,
    "git_sha" VARCHAR,
    "git_dirty" BOOLEAN,
    "version" VARCHAR,
    "packages" JSON,
    "config" JSON
);

CREATE TABLE hosts (
    "run_id" VARCHAR,
    "host_key" VARCHAR,
    "cpu" VARCHAR,
    "cores" INTEGER,
    "memory_bytes" BIGINT,
    "facts" JSON
);

CREATE TABLE cases (
    "run_id" VARCHAR,
    "case_key" VARCHAR,
    "method_key" VARCHAR,
    "group_key" VARCHAR,
    "suite" VARCHAR,
    "suite_version" VARCHAR,
    "protocol" VARCHAR,
    "model" VARCHAR,
    "layers" VARCHAR,
    "structure" VARCHAR,
    "routing" VARCHAR,
    "quantization" VARCHAR,
    "sparsity" VARCHAR,
    "backend" VARCHAR,
    "traffic" VARCHAR,
    "tokens" INTEGER,
    "dtype" VARCHAR,
    "pass" VARCHAR,
    "boundary" VARCHAR,
    "threads" INTEGER,
    "residency" VARCHAR,
    "device" VARCHAR,
    "seed" BIGINT,
    "base" VARCHAR,
    "evidence" VARCHAR,
    "status" VARCHAR,
    "reason" VARCHAR,
    "flags" VARCHAR[],
    "weights" VARCHAR,
    "sparse" VARCHAR,
    "executed" JSON,
    "params" JSON,
    "error" DOUBLE,
    "error_bound" DOUBLE,
    "flips" BIGINT,
    "input_sha256" VARCHAR,
    "elapsed_s" DOUBLE,
    "finished_at" TIMESTAMP
);

CREATE TABLE timings_raw (
    "run_id" VARCHAR,
    "case_key" VARCHAR,
    "process" INTEGER,
    "clock" VARCHAR,
    "sitting" VARCHAR,
    "mode" VARCHAR,
    "ns" BIGINT[],
    "turn" INTEGER[],
    "n" BIGINT,
    "min_ns" BIGINT,
    "mean_ns" DOUBLE,
    "median_ns" DOUBLE,
    "median_lo_ns" DOUBLE,
    "median_hi_ns" DOUBLE,
    "p90_ns" DOUBLE,
    "p95_ns" DOUBLE,
    "p99_ns" DOUBLE,
    "switches" BIGINT
);

CREATE TABLE metrics_raw (
    "run_id" VARCHAR,
    "case_key" VARCHAR,
    "name" VARCHAR,
    "value" DOUBLE,
    "unit" VARCHAR,
    "lo" DOUBLE,
    "hi" DOUBLE,
    "n" BIGINT
);

CREATE TABLE series (
    "run_id" VARCHAR,
    "case_key" VARCHAR,
    "name" VARCHAR,
    "unit" VARCHAR,
    "layer" INTEGER,
    "step" INTEGER,
    "values" DOUBLE[]
);

CREATE TABLE items (
    "run_id" VARCHAR,
    "case_key" VARCHAR,
    "task" VARCHAR,
    "item" VARCHAR,
    "metric" VARCHAR,
    "value" DOUBLE
);

CREATE TABLE blobs (
    "run_id" VARCHAR,
    "case_key" VARCHAR,
    "name" VARCHAR,
    "sha256" VARCHAR,
    "bytes" BIGINT
);

CREATE TABLE claims (
    "run_id" VARCHAR,
    "key" VARCHAR,
    "title" VARCHAR,
    "claim" VARCHAR,
    "kind" VARCHAR,
    "figure" VARCHAR,
    "ours" VARCHAR,
    "model" VARCHAR,
    "unit" VARCHAR,
    "direction" VARCHAR,
    "margin" DOUBLE,
    "seeds" BIGINT[],
    "a" DOUBLE[],
    "b" DOUBLE[],
    "estimate" DOUBLE,
    "lo" DOUBLE,
    "hi" DOUBLE,
    "verdict" VARCHAR,
    "reason" VARCHAR,
    "spec" JSON
);

CREATE TABLE comparisons (
    "run_id" VARCHAR,
    "base_case" VARCHAR,
    "case_key" VARCHAR,
    "clock" VARCHAR,
    "sitting" VARCHAR,
    "ratio" DOUBLE,
    "lo" DOUBLE,
    "hi" DOUBLE,
    "p" DOUBLE,
    "pairs" BIGINT,
    "verdict" VARCHAR,
    "reason" VARCHAR
);

CREATE TABLE parts (
    "run_id" VARCHAR,
    "part" VARCHAR,
    "sha256" VARCHAR,
    PRIMARY KEY ("run_id", "part")
);

CREATE TABLE run_files (
    "run_id" VARCHAR PRIMARY KEY,
    "sha256" VARCHAR
);
