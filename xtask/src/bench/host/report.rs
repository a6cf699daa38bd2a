//! What was measured, in proportion: speeds and exits of both sides, their ratios, and how far the rounds differ.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{
    exits::{Exits, Reason},
    sides::Run,
    workload::{Unit, Workload},
};

/// Everything measured.
#[derive(Debug, Serialize)]
pub struct Report {
    /// What was compared with what, and how.
    pub conditions: Vec<String>,
    /// One for each workload.
    pub rows: Vec<Row>,
    /// Exits to our own monitor, from the first workload to the last, by its own names for them.
    pub own_exits: BTreeMap<String, u64>,
}

/// A workload.
#[derive(Debug, Serialize)]
pub struct Row {
    /// Its name.
    pub workload: String,
    /// What its speed is in.
    pub speed_unit: &'static str,
    /// What its exits are divided by.
    pub exits_unit: &'static str,
    /// On our test machine.
    pub enlit: Figures,
    /// On QEMU.
    pub qemu: Figures,
    /// How many times as fast ours is.
    pub speed_ratio: Spread,
    /// How many times as many exits ours has.
    pub exits_ratio: Spread,
}

/// One side of a workload.
#[derive(Debug, Serialize)]
pub struct Figures {
    /// Speed of the rounds.
    pub speed: Spread,
    /// Exits for each I/O or MiB, those of starting the workload left out.
    pub exits: Spread,
    /// All exits of all rounds, those of starting the workload included.
    pub total_exits: u64,
    /// What all rounds did, in I/Os or MiB.
    pub total_work: f64,
    /// Exits for each I/O or MiB, by reason.
    pub by_reason: BTreeMap<Reason, f64>,
    /// Exits to the monitor's process, for each I/O or MiB.
    pub to_monitor: f64,
}

/// The middle of several numbers, and how far they lie apart.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Spread {
    pub median: f64,
    pub least: f64,
    pub most: f64,
}

impl Spread {
    /// Of several numbers; of none it is nothing.
    pub fn of(numbers: impl IntoIterator<Item = f64>) -> Self {
        let mut sorted: Vec<_> = numbers.into_iter().collect();
        sorted.sort_by(f64::total_cmp);
        let at = |index: usize| sorted.get(index).copied().unwrap_or(0.0);
        let middle = sorted.len() / 2;
        Self {
            median: if sorted.len().is_multiple_of(2) {
                f64::midpoint(at(middle.saturating_sub(1)), at(middle))
            } else {
                at(middle)
            },
            least: at(0),
            most: at(sorted.len().saturating_sub(1)),
        }
    }
}

/// The runs of one workload on one side.
#[derive(Debug, Clone)]
pub struct Rounds {
    /// What starting it costs.
    pub least: Exits,
    /// One run a round.
    pub runs: Vec<Run>,
}

impl Rounds {
    /// None yet.
    pub fn new(least: Exits) -> Self {
        Self {
            least,
            runs: Vec::new(),
        }
    }

    fn speeds(&self, unit: Unit) -> Vec<f64> {
        self.runs.iter().map(|run| run.done.speed(unit)).collect()
    }

    fn exits(&self, unit: Unit) -> Vec<f64> {
        let exits = |run: &Run| {
            let net = run.exits.clone() - &self.least;
            net.counted() as f64 / run.done.amount(unit)
        };
        self.runs.iter().map(exits).collect()
    }

    fn figures(&self, unit: Unit) -> Figures {
        let work: f64 = self.runs.iter().map(|run| run.done.amount(unit)).sum();
        let runs = self.runs.iter();
        let all = runs.fold(Exits::default(), |sum, run| sum + &run.exits);
        let nets = self.runs.iter().map(|run| run.exits.clone() - &self.least);
        let net = nets.fold(Exits::default(), |sum, net| sum + &net);
        let by_reason = Reason::COUNTED.map(|reason| (reason, net.of(reason) as f64 / work));
        Figures {
            speed: Spread::of(self.speeds(unit)),
            exits: Spread::of(self.exits(unit)),
            total_exits: all.counted(),
            total_work: work,
            by_reason: by_reason.into(),
            to_monitor: net.to_monitor as f64 / work,
        }
    }
}

impl Row {
    /// Of the rounds on both sides, which were made in turns: each is compared with its neighbour.
    pub fn new(workload: Workload, enlit: &Rounds, qemu: &Rounds) -> Self {
        let unit = workload.unit();
        let ratios = |ours: Vec<f64>, theirs: Vec<f64>| {
            Spread::of(ours.iter().zip(theirs).map(|(ours, theirs)| ours / theirs))
        };
        Self {
            workload: workload.name(),
            speed_unit: unit.speed(),
            exits_unit: unit.one(),
            enlit: enlit.figures(unit),
            qemu: qemu.figures(unit),
            speed_ratio: ratios(enlit.speeds(unit), qemu.speeds(unit)),
            exits_ratio: ratios(enlit.exits(unit), qemu.exits(unit)),
        }
    }
}

impl Report {
    /// The tables.
    pub fn text(&self) -> String {
        let mut lines = self.conditions.clone();
        lines.push(String::new());
        lines.push(head("speed"));
        for row in &self.rows {
            let number = |spread: Spread| format!("{:.0} {}", spread.median, row.speed_unit);
            lines.push(line(
                &row.workload,
                &number(row.enlit.speed),
                &number(row.qemu.speed),
                row.speed_ratio,
            ));
        }
        lines.push(String::new());
        lines.push(head("VM exits"));
        for row in &self.rows {
            let number = |spread: Spread| format!("{:.3} / {}", spread.median, row.exits_unit);
            lines.push(line(
                &row.workload,
                &number(row.enlit.exits),
                &number(row.qemu.exits),
                row.exits_ratio,
            ));
        }
        lines.push(String::new());
        lines.push("exits of all rounds, and for each I/O or MiB by reason (`monitor`: those of them that reach the process)".into());
        let names = Reason::COUNTED.map(|reason| format!("{:>10}", reason.name()));
        lines.push(format!(
            "{:<34}{:<6}{:>9}{:>9}  {}{:>10}",
            "",
            "",
            "exits",
            "work",
            names.concat(),
            "monitor"
        ));
        for row in &self.rows {
            for (name, figures) in [("enlit", &row.enlit), ("QEMU", &row.qemu)] {
                let reasons: String = Reason::COUNTED
                    .iter()
                    .map(|reason| figures.by_reason.get(reason).copied().unwrap_or(0.0))
                    .map(|number| format!("{number:>10.3}"))
                    .collect();
                lines.push(format!(
                    "{:<34}{name:<6}{:>9}{:>9.0}  {reasons}{:>10.3}",
                    if name == "enlit" { &row.workload } else { "" },
                    figures.total_exits,
                    figures.total_work,
                    figures.to_monitor,
                ));
            }
        }
        lines.push(String::new());
        let own: Vec<_> = self
            .own_exits
            .iter()
            .map(|(name, count)| format!("{name}: {count}"))
            .collect();
        lines.push(format!(
            "exits to enlit-vmm over all workloads, by its own count: {}",
            if own.is_empty() {
                "none".into()
            } else {
                own.join(", ")
            }
        ));
        lines.join("\n")
    }
}

fn head(what: &str) -> String {
    format!(
        "{what:<34}{:>16}{:>16}   ratio (least to most of the rounds)",
        "enlit-vmm", "QEMU virtio"
    )
}

fn line(name: &str, enlit: &str, qemu: &str, ratio: Spread) -> String {
    format!(
        "{name:<34}{enlit:>16}{qemu:>16}   {:.2} ({:.2} to {:.2})",
        ratio.median, ratio.least, ratio.most
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::host::workload::{ALL, Done};

    fn run(requests: f64, seconds: f64, halts: u64) -> Run {
        Run {
            done: Done {
                requests,
                bytes: requests * 4096.0,
                seconds,
            },
            exits: Exits {
                by_reason: BTreeMap::from([(Reason::Halt, halts), (Reason::Console, 77)]),
                to_monitor: halts / 2,
            },
        }
    }

    fn rounds(least: u64, runs: &[(f64, f64, u64)]) -> Rounds {
        Rounds {
            least: run(1.0, 1.0, least).exits,
            runs: runs
                .iter()
                .map(|&(requests, seconds, halts)| run(requests, seconds, halts))
                .collect(),
        }
    }

    #[test]
    fn the_median_is_in_the_middle_of_any_order() {
        let spread = Spread::of([3.0, 1.0, 2.0]);
        assert_eq!((spread.least, spread.median, spread.most), (1.0, 2.0, 3.0));
        assert_eq!(Spread::of([4.0, 2.0]).median, 3.0);
        assert_eq!(Spread::of([]).median, 0.0);
    }

    #[test]
    fn exits_are_divided_by_the_work_without_those_of_the_start() {
        let ours = rounds(10, &[(100.0, 1.0, 110), (100.0, 2.0, 210)]);
        let figures = ours.figures(Unit::Requests);
        assert_eq!((figures.exits.least, figures.exits.most), (1.0, 2.0));
        assert_eq!(figures.total_exits, 320);
        assert_eq!(figures.total_work, 200.0);
        assert_eq!(figures.by_reason[&Reason::Halt], 1.5);
        assert_eq!(figures.to_monitor, 0.75);
        assert_eq!((figures.speed.least, figures.speed.most), (50.0, 100.0));
    }

    #[test]
    fn each_round_is_compared_with_its_neighbour() {
        let ours = rounds(0, &[(100.0, 1.0, 100), (400.0, 1.0, 400)]);
        let theirs = rounds(0, &[(200.0, 1.0, 400), (400.0, 1.0, 800)]);
        let row = Row::new(ALL[0], &ours, &theirs);
        let ratio = row.speed_ratio;
        assert_eq!((ratio.least, ratio.median, ratio.most), (0.5, 0.75, 1.0));
        assert_eq!(row.exits_ratio.median, 0.5);
        let text = Report {
            conditions: vec!["here".into()],
            rows: vec![row],
            own_exits: BTreeMap::from([("other".into(), 3)]),
        }
        .text();
        assert!(text.contains("0.75 (0.50 to 1.00)"), "{text}");
        assert!(text.contains("1.000 / I/O") && text.contains("250 IOPS"));
        assert!(text.ends_with("by its own count: other: 3"));
    }
}
