-- The store of one run: everything that happened, kept once. SQLite 3.37 or newer.
--
-- NULL means "not measured" or "does not apply", never 0. Units stand in the names: `_nats`, `_s` (seconds), `_unix_s`
-- (seconds since 1970, UTC), `_share` (fraction of 1), `_bytes`, `_decisions`; a column without one is a plain number.
-- Rounds, decisions, rows and slots count from 0. Long tables are keyed in the order in which they are written, so that
-- their pages stay full.

CREATE TABLE run (
    id INTEGER PRIMARY KEY CHECK (id = 1),  -- always 1: a file holds one run
    run_id TEXT NOT NULL,                   -- drawn when the run began; copies of the file share it
    command TEXT NOT NULL,                  -- what was asked for, such as grow
    task TEXT NOT NULL,                     -- what was learned
    host TEXT NOT NULL,                     -- impaired or ample
    controller TEXT NOT NULL,               -- who decided
    seed INTEGER NOT NULL,                  -- of every random stream
    config TEXT NOT NULL,                   -- every setting, resolved, as JSON
    esper_version TEXT NOT NULL,
    python_version TEXT NOT NULL,
    torch_version TEXT NOT NULL,
    sqlite_version TEXT NOT NULL,
    commit_hash TEXT,                       -- of the source, with "+" behind it where files were changed; NULL: no repository
    machine TEXT NOT NULL,                  -- its network name
    platform TEXT NOT NULL,                 -- operating system and processor type
    processors INTEGER NOT NULL,            -- logical processors
    threads INTEGER NOT NULL,               -- that torch computes with
    device TEXT NOT NULL,                   -- of the tensors: cpu or cuda
    accelerator TEXT,                       -- its name; NULL: none in use
    process_id INTEGER NOT NULL,
    level TEXT NOT NULL CHECK (level IN ('lean', 'full')),  -- lean: nothing for each decision
    planned_decisions INTEGER NOT NULL,     -- of all planned rounds, a population's decision counted once
    status TEXT NOT NULL CHECK (status IN ('running', 'finished', 'interrupted', 'failed')),
    status_reason TEXT,                     -- why it failed, in words
    started_unix_s REAL NOT NULL,
    heartbeat_unix_s REAL NOT NULL,         -- last sign of life; one a second
    heartbeat_late_s REAL NOT NULL,         -- silent for longer: no longer running, whatever the status says
    ended_unix_s REAL,
    flushes INTEGER NOT NULL,               -- transactions so far
    stalls INTEGER NOT NULL,                -- times that the run had to wait for a full buffer
    stall_s REAL NOT NULL                   -- how long it waited
) STRICT;

-- What each check of a gate means and where its limit stood.
CREATE TABLE gate_check (
    position INTEGER PRIMARY KEY,           -- order in which a gate asks
    gate TEXT NOT NULL,                     -- G1, G2, G3, G5
    check_name TEXT NOT NULL,
    quantity TEXT NOT NULL,                 -- column of `transition` that holds its value
    meaning TEXT NOT NULL,                  -- in words, with the unit
    limit_value REAL,                       -- NULL: the value only has to be finite
    standard_errors REAL,                   -- of the value, so many are added to the limit; NULL: it has none
    UNIQUE (gate, check_name)
) STRICT;

-- One episode of every row of a population, and the policy update after it.
CREATE TABLE round (
    round INTEGER PRIMARY KEY,
    purpose TEXT NOT NULL,                  -- grow, control, train, selection, test
    arm TEXT NOT NULL,                      -- what is compared, such as "host alone"
    controller TEXT NOT NULL,
    grows INTEGER NOT NULL CHECK (grows IN (0, 1)),  -- 1: its controller may grow
    rows INTEGER NOT NULL,                  -- hosts
    horizon_decisions INTEGER NOT NULL,
    updates_per_decision INTEGER NOT NULL,
    started_unix_s REAL NOT NULL,
    ended_unix_s REAL,
    decisions INTEGER NOT NULL,             -- made so far
    train_loss_nats REAL,                   -- mean over rows at the last of them
    val_loss_nats REAL,                     -- the same on reward-validation
    val_accuracy REAL CHECK (val_accuracy BETWEEN 0 AND 1),
    -- The policy update; NULL where none follows.
    update_s REAL,                          -- its wall time
    epochs INTEGER,                         -- passes made, those stopped early included
    minibatches INTEGER,                    -- steps made
    skipped_minibatches INTEGER,            -- not finite
    stopped_early INTEGER CHECK (stopped_early IN (0, 1)),
    kl_nats REAL,                           -- new against old policy, summed over heads
    clip_share REAL CHECK (clip_share BETWEEN 0 AND 1),  -- decisions whose ratio was clipped
    policy_loss REAL,
    value_loss REAL,
    entropy REAL,                           -- mean over heads with a choice, 1 is uniform
    explained_variance REAL,                -- of the returns by the value; 1 is perfect, 0 a constant
    gradient_norm REAL,                     -- before clipping, mean over minibatches
    policy_learning_rate REAL
) STRICT;

-- What a head of the policy did in one round.
CREATE TABLE head (
    round INTEGER NOT NULL,
    head TEXT NOT NULL,
    used_decisions INTEGER NOT NULL,        -- in which the operation used it
    choice_decisions INTEGER NOT NULL,      -- in which it also had more than one legal choice
    entropy REAL CHECK (entropy BETWEEN 0 AND 1.000001),  -- mean over choice_decisions, 1 is uniform
    kl_nats REAL,                           -- its share of the round's
    gradient_norm REAL,
    PRIMARY KEY (round, head)
) STRICT, WITHOUT ROWID;

-- What a layer of the policy network did in one update (--record-layers): a module with parameters of its own. Over all
-- minibatches before the early stop, those that were not taken included.
CREATE TABLE layer (
    round INTEGER NOT NULL,
    position INTEGER NOT NULL,              -- in the order of the network
    layer TEXT NOT NULL,                    -- its name there, such as encoder.0.linear1
    gradient_norm REAL,                     -- before clipping, mean over minibatches; NULL: never finite
    gradient_largest REAL,                  -- absolute value, the largest of all that is finite
    gradient_nonfinite INTEGER NOT NULL,    -- entries, summed over minibatches
    -- The same of what it gave out, decisions that were not made included; NULL: not measured, or never finite.
    activation_mean REAL,
    activation_deviation REAL,              -- standard deviation over the entries of one output
    activation_largest REAL,
    activation_nonfinite INTEGER,
    PRIMARY KEY (round, position)
) STRICT, WITHOUT ROWID;

-- One host from initialisation to its end.
CREATE TABLE episode (
    round INTEGER NOT NULL,
    row INTEGER NOT NULL,
    row_id INTEGER NOT NULL,                -- decides initialisation and data order: equal ids start equal
    twin_round INTEGER,                     -- the control with the same initialisation and data that never grows;
    twin_row INTEGER,                       -- NULL: this is one, or there is none
    status TEXT NOT NULL CHECK (status IN ('running', 'finished', 'interrupted', 'rolled back', 'given up')),
    status_reason TEXT,                     -- why it was rolled back or given up, in words; NULL: it was not
    price_nats REAL NOT NULL,               -- of one unit of ln(1 + added / host parameters)
    learning_rate REAL NOT NULL,            -- its peak
    label_noise_share REAL NOT NULL,        -- wrong training labels
    host_parameters INTEGER NOT NULL,
    host_multiply_adds INTEGER NOT NULL,    -- for one example
    -- At the end; NULL before.
    decisions INTEGER,
    added_parameters INTEGER,               -- of the seeds in the forward pass; at the end, of those that are committed
    added_multiply_adds INTEGER,            -- the same, for one example
    committed_seeds INTEGER,
    rent_nats REAL,                         -- price times ln(1 + added / host parameters)
    reward REAL,                            -- sum over the episode, in the unit of `decision.reward`
    val_loss_nats REAL,
    val_accuracy REAL CHECK (val_accuracy BETWEEN 0 AND 1),
    test_loss_nats REAL,
    test_accuracy REAL CHECK (test_accuracy BETWEEN 0 AND 1),
    skipped_updates INTEGER,                -- of the host, because its gradient was not finite
    restorations INTEGER,                   -- times that it went on from its last good state after it had failed
    training_s REAL,                        -- wall time of its population, shared by the rows
    PRIMARY KEY (round, row)
) STRICT, WITHOUT ROWID;

-- Who is compared with a round that has ended.
CREATE INDEX episode_of_twin ON episode (twin_round);

-- Every decision of every row (level full).
CREATE TABLE decision (
    round INTEGER NOT NULL,
    decision INTEGER NOT NULL,
    row INTEGER NOT NULL,
    legal_ops INTEGER NOT NULL,             -- sum of 2^op over the legal: 1 WAIT, 2 GERMINATE, 4 SET_ALPHA_TARGET, 8 CULL, 16 FOSSILIZE, 32 ADVANCE
    op TEXT NOT NULL,                       -- the choice; the heads that did not apply are NULL from here on
    slot INTEGER,
    blueprint TEXT,
    style TEXT,
    tempo_decisions INTEGER,                -- of the first ramp
    alpha_target REAL,
    alpha_speed_decisions INTEGER,          -- of a later ramp; 0: at once
    alpha_curve TEXT,
    p_op REAL,                              -- probability of each choice given those before it; NULL: the controller has none
    p_slot REAL,
    p_blueprint REAL,
    p_style REAL,
    p_tempo REAL,
    p_alpha_target REAL,
    p_alpha_speed REAL,
    p_alpha_curve REAL,
    accepted INTEGER NOT NULL CHECK (accepted IN (0, 1)),
    refused_by TEXT,                        -- the check; NULL: accepted
    value REAL,                             -- what the critic expected, in the unit of `reward`
    reward REAL,                            -- paid after the decision: nats, or a share where the utility is accuracy
    -- Its parts, which sum to it; NULL: not part of it. In the unit of the reward.
    reward_gain REAL,                       -- change of the lead over the twin
    reward_rent REAL,                       -- change of price times ln(1 + added / host parameters), negative
    reward_own REAL,                        -- change of the host's own utility
    reward_shaping REAL,                    -- potential-based
    reward_attribution REAL,                -- change of believed contributions
    reward_escrow REAL,                     -- change of credited contributions
    reward_drip REAL,                       -- contributions of committed seeds, in equal parts to the end
    reward_sparse REAL,                     -- lead less rent, all at the end
    reward_intervention REAL,               -- charge for what was asked for
    reward_penalty REAL,                    -- of the governor
    train_loss_nats REAL,                   -- mean over the updates of the decision whose loss was finite
    val_loss_nats REAL,                     -- on reward-validation, after them
    val_accuracy REAL CHECK (val_accuracy BETWEEN 0 AND 1),
    skipped_updates INTEGER NOT NULL,       -- of the host, because its gradient was not finite
    PRIMARY KEY (round, decision, row)
) STRICT, WITHOUT ROWID;

-- A host that failed in a decision and was returned to its last good state, its seeds that were not committed culled.
CREATE TABLE failure (
    round INTEGER NOT NULL,
    decision INTEGER NOT NULL,
    row INTEGER NOT NULL,
    reason TEXT NOT NULL,                   -- in words
    culled_seeds INTEGER NOT NULL,
    restored INTEGER NOT NULL CHECK (restored IN (0, 1)),  -- 1: it went on; 0: its episode was over
    learning_rate_share REAL,               -- that it went on with, until it has recovered; NULL: its episode was over
    unix_s REAL NOT NULL,                   -- when it was recorded
    PRIMARY KEY (round, decision, row)
) STRICT, WITHOUT ROWID;

-- Every seed after every decision (level full): what changes. What a seed is for its life stands in `transition`.
CREATE TABLE slot (
    round INTEGER NOT NULL,
    decision INTEGER NOT NULL,
    row INTEGER NOT NULL,
    slot INTEGER NOT NULL,
    seed INTEGER NOT NULL,                  -- the how manieth of its row
    stage TEXT NOT NULL,
    blueprint TEXT NOT NULL,
    alpha REAL NOT NULL CHECK (alpha BETWEEN 0 AND 1),
    parameters INTEGER NOT NULL,
    contribution_nats REAL,                 -- loss without it less loss with it, once it is blended
    contribution_se_nats REAL,              -- standard error of the mean over examples
    contribution_age_decisions INTEGER,     -- since that was measured
    incubator_gain_nats REAL,               -- by how much it would lower the loss if blended; in TRAINING
    incubator_gain_se_nats REAL,
    gradient_ratio REAL,                    -- root mean square of its gradient over that of its host
    PRIMARY KEY (round, decision, row, slot)
) STRICT, WITHOUT ROWID;

-- Every transition asked for, allowed or refused, and those made by the clock, the governor and the end of the episode.
CREATE TABLE transition (
    round INTEGER NOT NULL,
    decision INTEGER NOT NULL,
    row INTEGER NOT NULL,
    step INTEGER NOT NULL,                  -- order within the decision: 0 the action, then the clock, the governor, the end
    slot INTEGER NOT NULL,                  -- as it was named, even where it does not exist
    seed INTEGER,                           -- the how manieth of its row; NULL: there is none
    blueprint TEXT,
    operator TEXT,
    parameters INTEGER,                     -- of the seed
    actor TEXT NOT NULL,                    -- controller, clock, governor, end of episode
    op TEXT NOT NULL,                       -- what was asked for; clock: time passed; rollback: the host had failed; harvest: not committed
    before TEXT NOT NULL,                   -- stage
    after TEXT NOT NULL,                    -- the same stage where it was refused
    allowed INTEGER NOT NULL CHECK (allowed IN (0, 1)),
    gate TEXT,                              -- that was asked; for a cull, the one that the seed stood before; NULL: none
    refused_by TEXT,                        -- the check; NULL: allowed
    failed_checks TEXT,                     -- of the gate, joined by commas; NULL: none
    reason TEXT,                            -- in words, where no gate decided
    -- What the gate saw; NULL: not asked for by it, or not measured.
    host_loss_nats REAL,
    training_decisions INTEGER,
    gradient_norm REAL,
    gradient_ratio REAL,
    incubator_gain_nats REAL,
    alpha_distance REAL,
    probation_decisions INTEGER,
    contribution_nats REAL,
    limit_nats REAL,                        -- that incubator gain (G2) or contribution (G5) had to be above, errors included
    PRIMARY KEY (round, decision, row, step)
) STRICT, WITHOUT ROWID;

-- The life of a seed without sorting all transitions.
CREATE INDEX transition_of_seed ON transition (round, row, seed, decision, step) WHERE seed IS NOT NULL;

-- Loss of a host with chosen sets of its seeds.
CREATE TABLE contribution (
    round INTEGER NOT NULL,
    decision INTEGER NOT NULL,              -- after which it was measured
    row INTEGER NOT NULL,
    coalition INTEGER NOT NULL,             -- sum of 2^slot over the seeds that take part
    loss_nats REAL,                         -- on reward-validation
    examples INTEGER NOT NULL,              -- that it is the mean of
    PRIMARY KEY (round, decision, row, coalition)
) STRICT, WITHOUT ROWID;

-- Something that a person should know, from when it began to when it was over.
CREATE TABLE incident (
    incident INTEGER PRIMARY KEY,
    kind TEXT NOT NULL,                     -- as in incidents.toml
    subject TEXT NOT NULL,                  -- what it is about: an arm, a head, the disk
    message TEXT NOT NULL,                  -- in words, with its worst value
    value REAL NOT NULL,                    -- the worst, in the unit of the kind
    opened_round INTEGER,
    opened_unix_s REAL NOT NULL,
    closed_round INTEGER,
    closed_unix_s REAL                      -- NULL: not over
) STRICT;

-- Where time went: one line for each phase and flush.
CREATE TABLE timing (
    unix_s REAL NOT NULL,                   -- of the flush
    round INTEGER NOT NULL,
    phase TEXT NOT NULL,                    -- write is the store's own
    decisions INTEGER NOT NULL,             -- a population's decision counted once
    wall_s REAL NOT NULL,
    cpu_s REAL NOT NULL,                    -- of all threads of the process; of the writer alone for write
    PRIMARY KEY (unix_s, round, phase)
) STRICT, WITHOUT ROWID;

-- The machine, every five seconds.
CREATE TABLE machine (
    unix_s REAL PRIMARY KEY,
    processor_share REAL,                   -- of all processors, whoever uses them
    process_processors REAL,                -- processors that this process keeps busy
    memory_bytes INTEGER NOT NULL,          -- resident, this process
    memory_free_bytes INTEGER NOT NULL,     -- available on the machine
    disk_free_bytes INTEGER NOT NULL,       -- where the store lies
    store_bytes INTEGER NOT NULL,           -- size of the store
    accelerator_memory_bytes INTEGER,       -- taken by this process; NULL: none in use
    accelerator_free_bytes INTEGER
) STRICT, WITHOUT ROWID;
