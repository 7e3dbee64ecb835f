ALTER TABLE comparisons ADD COLUMN "kind" VARCHAR;
ALTER TABLE comparisons ADD COLUMN "metric" VARCHAR;
ALTER TABLE comparisons ADD COLUMN "label" VARCHAR;
ALTER TABLE comparisons ADD COLUMN "base" VARCHAR;
ALTER TABLE comparisons ADD COLUMN "candidate" VARCHAR;
ALTER TABLE comparisons ADD COLUMN "base_value" DOUBLE;
ALTER TABLE comparisons ADD COLUMN "candidate_value" DOUBLE;
ALTER TABLE comparisons ADD COLUMN "unit" VARCHAR;
ALTER TABLE comparisons ADD COLUMN "q" DOUBLE;
ALTER TABLE comparisons ADD COLUMN "turns" BIGINT;
ALTER TABLE comparisons ADD COLUMN "margin" DOUBLE;
ALTER TABLE comparisons ADD COLUMN "asked" DOUBLE;
ALTER TABLE comparisons ADD COLUMN "tau" DOUBLE;
ALTER TABLE comparisons ADD COLUMN "detectable" DOUBLE;
ALTER TABLE comparisons ADD COLUMN "moved" VARCHAR[];

CREATE TABLE turns (
    "run_id" VARCHAR,
    "case_key" VARCHAR,
    "side" VARCHAR,
    "pair" INTEGER,
    "clock" VARCHAR,
    "ns" BIGINT[],
    "turn" INTEGER[],
    "switches" BIGINT
);
