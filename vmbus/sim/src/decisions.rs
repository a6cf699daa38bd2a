//! The seeded scheduler's dice, and the record of what they decided.
//!
//! A seed must give the same run years from now, so the generator's numbers must never change: oorandom is
//! PCG and nothing else, where the distributions of larger crates may change with a release.

use std::collections::VecDeque;
use std::fmt;

/// How many of the last actions a failure shows.
const TAIL: usize = 60;

/// The dice.
pub struct Dice(oorandom::Rand64);

impl Dice {
    pub fn new(seed: u64) -> Self {
        Self(oorandom::Rand64::new(u128::from(seed)))
    }

    pub fn number(&mut self) -> u64 {
        self.0.rand_u64()
    }

    /// A number below `end`, which is not 0.
    pub fn below(&mut self, end: usize) -> usize {
        self.0.rand_range(0..end as u64) as usize
    }

    /// A number of `from..=to`.
    pub fn between(&mut self, from: u64, to: u64) -> u64 {
        self.0.rand_range(from..to + 1)
    }

    /// True once in `n` times.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.0.rand_range(0..n) == 0
    }

    /// One of these, by their weights.
    pub fn pick<T: Copy>(&mut self, choices: &[(u64, T)]) -> T {
        let total = choices.iter().map(|(weight, _)| weight).sum();
        let mut at = self.0.rand_range(0..total);
        for (weight, choice) in choices {
            if at < *weight {
                return *choice;
            }
            at -= weight;
        }
        choices[0].1
    }
}

/// One thing that happened.
#[derive(Clone, Copy)]
pub struct Line {
    step: u64,
    depth: u32,
    device: Option<usize>,
    what: &'static str,
    number: u64,
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:>9}  {:>2$}", self.step, "", 2 * self.depth as usize)?;
        if let Some(device) = self.device {
            write!(f, "[{device}] ")?;
        }
        write!(f, "{} {}", self.what, self.number)
    }
}

/// What has happened so far.
pub struct Trace {
    pub seed: u64,
    /// How many steps the whole run has.
    pub wanted: u64,
    /// Decisions that were taken and led to something.
    pub steps: u64,
    pub round: u64,
    hash: u64,
    tail: VecDeque<Line>,
    print: bool,
}

impl Trace {
    pub fn new(seed: u64, wanted: u64, print: bool) -> Self {
        Self {
            seed,
            wanted,
            steps: 0,
            round: 0,
            hash: 0xCBF2_9CE4_8422_2325,
            tail: VecDeque::with_capacity(TAIL),
            print,
        }
    }

    /// FNV-1a over everything noted.
    pub fn hash(&self) -> u64 {
        self.hash
    }

    fn mix(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.hash = (self.hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01B3);
        }
    }

    /// Notes something that happened.
    pub fn note(&mut self, depth: u32, device: Option<usize>, what: &'static str, number: u64) {
        let line = Line {
            step: self.steps,
            depth,
            device,
            what,
            number,
        };
        self.mix(&self.steps.to_le_bytes());
        self.mix(
            &device
                .map_or(u64::MAX, |device| device as u64)
                .to_le_bytes(),
        );
        self.mix(what.as_bytes());
        self.mix(&number.to_le_bytes());
        if self.print {
            println!("{line}");
        }
        if self.tail.len() == TAIL {
            self.tail.pop_front();
        }
        self.tail.push_back(line);
    }
}

impl fmt::Display for Trace {
    /// What a failure says.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "the last actions:")?;
        for line in &self.tail {
            writeln!(f, "{line}")?;
        }
        writeln!(
            f,
            "seed {}, step {}, round {}; replay with",
            self.seed, self.steps, self.round
        )?;
        write!(
            f,
            "    cargo xtask sim --seed {} --steps {}",
            self.seed, self.wanted
        )
    }
}
