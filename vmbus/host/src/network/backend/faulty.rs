//! A network that misbehaves on purpose: loss, duplication, reordering, delay and corruption, the same ones again for the same seed.

use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use alloc::vec::Vec;

use super::{Backend, LargeSends, SendError, Waker};
use crate::network::offload::Segmentation;
use crate::sync::Mutex;

/// How far a reordered frame falls behind, in units of 100 ns.
const BEHIND: u64 = 10_000;

/// Frames that are held back at most, each way.
const HELD: usize = 1024;

/// What goes wrong, both ways. Rates are frames in a thousand.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Faults {
    /// Frames that are lost.
    pub loss: u16,
    /// Frames that come twice.
    pub duplication: u16,
    /// Frames that others overtake.
    pub reordering: u16,
    /// Frames of which one bit is another.
    pub corruption: u16,
    /// The time that every frame takes, in units of 100 ns.
    pub delay: u64,
}

/// A network with faults.
pub struct Faulty<B> {
    inner: B,
    state: Arc<Mutex<State>>,
    waker: Mutex<Option<Waker>>,
}

/// Changes the faults of a network while it runs. Clones are the same.
#[derive(Clone)]
pub struct FaultControl(Arc<Mutex<State>>);

struct State {
    faults: Faults,
    random: Random,
    /// To the network and from it.
    lanes: [Lane; 2],
    sequence: u64,
}

/// One way.
#[derive(Default)]
struct Lane {
    /// Frames whose time begins with the next look at the clock, and how long they wait.
    fresh: Vec<(u64, Vec<u8>)>,
    /// Frames by the time when they are due, and their order.
    waiting: BTreeMap<(u64, u64), Vec<u8>>,
    /// Frames that are due.
    due: alloc::collections::VecDeque<Vec<u8>>,
}

const OUT: usize = 0;
const IN: usize = 1;

/// SplitMix64 (Steele, Lea, Flood 2014): good enough to throw dice, and the same everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut word = self.0;
        word = (word ^ word >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        word = (word ^ word >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        word ^ word >> 31
    }

    fn hits(&mut self, rate: u16) -> bool {
        self.next() % 1000 < u64::from(rate)
    }
}

impl FaultControl {
    /// What goes wrong from now on. Frames that are held back already come when they would have.
    pub fn set(&self, faults: Faults) {
        self.0.lock().faults = faults;
    }
}

impl<B: Backend> Faulty<B> {
    /// This network without faults, for now, and the means to change that.
    pub fn new(inner: B, seed: u64) -> (Self, FaultControl) {
        let state = Arc::new(Mutex::new(State {
            faults: Faults::default(),
            random: Random(seed),
            lanes: Default::default(),
            sequence: 0,
        }));
        let faulty = Self {
            inner,
            state: state.clone(),
            waker: Mutex::new(None),
        };
        (faulty, FaultControl(state))
    }
}

impl State {
    /// Whether a frame of the card goes as it is, and behind no other.
    fn is_faultless(&self) -> bool {
        let [out, _] = &self.lanes;
        self.faults == Faults::default()
            && out.due.is_empty()
            && out.fresh.is_empty()
            && out.waiting.is_empty()
    }

    /// Throws the dice for a frame, and puts what is left of it in its lane.
    fn admit(&mut self, lane: usize, mut frame: Vec<u8>) {
        let Faults {
            loss,
            duplication,
            reordering,
            corruption,
            delay,
        } = self.faults;
        // Each frame takes as many numbers, so that one rate does not change what another hits.
        let hits = [loss, duplication, reordering, corruption].map(|rate| self.random.hits(rate));
        let [is_lost, is_doubled, is_late, is_spoilt] = hits;
        let place = self.random.next();
        let Some(lane) = self.lanes.get_mut(lane).filter(|_| !is_lost) else {
            return;
        };
        let bits = 8 * frame.len() as u64;
        if let Some(bit) = place.checked_rem(bits).filter(|_| is_spoilt)
            && let Some(byte) = frame.get_mut((bit / 8) as usize)
        {
            *byte ^= 1 << (bit % 8);
        }
        let wait = delay + if is_late { BEHIND } else { 0 };
        for _ in 0..if is_doubled { 2 } else { 1 } {
            if wait == 0 && lane.fresh.is_empty() && lane.waiting.is_empty() {
                lane.due.push_back(frame.clone());
            } else if lane.fresh.len() + lane.waiting.len() < HELD {
                lane.fresh.push((wait, frame.clone()));
            }
        }
    }

    /// Moves what is due.
    fn pass(&mut self, now: u64) {
        for lane in &mut self.lanes {
            for (wait, frame) in lane.fresh.drain(..) {
                self.sequence += 1;
                let due = now.saturating_add(wait);
                lane.waiting.insert((due, self.sequence), frame);
            }
            while let Some(first) = lane.waiting.first_entry() {
                if first.key().0 > now {
                    break;
                }
                lane.due.push_back(first.remove());
            }
        }
    }
}

impl<B: Backend> Faulty<B> {
    /// Hands over what is due. What the network has no room for is lost: it is a network with faults.
    fn push_out(&self) -> Result<(), SendError> {
        let frames = {
            let mut state = self.state.lock();
            let [out, _] = &mut state.lanes;
            core::mem::take(&mut out.due)
        };
        let mut result = Ok(());
        for frame in frames {
            let sent = self.inner.send(&frame);
            if result.is_ok() {
                result = sent;
            }
        }
        result
    }
}

impl<B: Backend> Backend for Faulty<B> {
    fn send(&self, frame: &[u8]) -> Result<(), SendError> {
        let is_held = {
            let mut state = self.state.lock();
            state.admit(OUT, frame.to_vec());
            let [out, _] = &state.lanes;
            !out.fresh.is_empty()
        };
        if is_held {
            // Its time begins when the card looks at the clock.
            let waker = self.waker.lock().clone();
            if let Some(waker) = waker {
                waker();
            }
        }
        match self.push_out() {
            Err(SendError::Down) => Err(SendError::Down),
            _ => Ok(()),
        }
    }

    fn receive(&self) -> Option<Vec<u8>> {
        loop {
            let mut state = self.state.lock();
            let [_, back] = &mut state.lanes;
            if let Some(frame) = back.due.pop_front() {
                return Some(frame);
            }
            drop(state);
            let frame = self.inner.receive()?;
            self.state.lock().admit(IN, frame);
        }
    }

    fn set_waker(&self, waker: Option<Waker>) {
        *self.waker.lock() = waker.clone();
        self.inner.set_waker(waker);
    }

    fn is_up(&self) -> bool {
        self.inner.is_up()
    }

    fn large_sends(&self) -> LargeSends {
        match self.inner.large_sends() {
            // Faults are for each frame.
            LargeSends::Cut if !self.state.lock().is_faultless() => LargeSends::None,
            inner => inner,
        }
    }

    fn send_large(&self, frame: &[u8], cut: &Segmentation) -> Result<(), SendError> {
        self.inner.send_large(frame, cut)
    }

    fn pass(&self, now: u64) -> Option<u64> {
        let inner = self.inner.pass(now);
        self.state.lock().pass(now);
        // Nobody can be told that there is no room.
        let _ = self.push_out();
        let state = self.state.lock();
        let lanes = state.lanes.iter();
        let next = lanes.filter_map(|lane| lane.waiting.first_key_value());
        next.map(|((due, _), _)| *due).chain(inner).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::backend::Pair;

    fn run(faults: Faults, seed: u64, count: u8) -> Vec<Vec<u8>> {
        let (one, other) = Pair::new();
        let (faulty, control) = Faulty::new(one, seed);
        control.set(faults);
        let mut all = Vec::new();
        let mut now = 0;
        for number in 0..count {
            faulty.send(&[number; 20]).unwrap();
            faulty.pass(now);
            now += BEHIND / 4;
            all.extend(core::iter::from_fn(|| other.receive()));
        }
        while let Some(at) = faulty.pass(now) {
            assert!(at > now);
            now = at;
        }
        all.extend(core::iter::from_fn(|| other.receive()));
        all
    }

    fn numbers(frames: &[Vec<u8>]) -> Vec<u8> {
        frames.iter().map(|frame| frame[0]).collect()
    }

    #[test]
    fn without_faults_all_comes_in_order() {
        let plain = run(Faults::default(), 1, 50);
        assert_eq!(numbers(&plain), (0..50).collect::<Vec<_>>());
    }

    #[test]
    fn each_fault_does_what_its_name_says_and_the_same_for_the_same_seed() {
        let of = |faults| {
            let frames = run(faults, 7, 200);
            assert_eq!(frames, run(faults, 7, 200));
            assert_ne!(frames, run(faults, 8, 200));
            frames
        };
        let none = Faults::default();
        let lost = of(Faults { loss: 250, ..none });
        assert!((100..190).contains(&lost.len()), "{}", lost.len());
        assert!(numbers(&lost).is_sorted());
        let doubled = of(Faults {
            duplication: 250,
            ..none
        });
        assert!((210..300).contains(&doubled.len()));
        let mixed = numbers(&of(Faults {
            reordering: 250,
            ..none
        }));
        assert_eq!(mixed.len(), 200);
        assert!(!mixed.is_sorted());
        let spoilt = of(Faults {
            corruption: 250,
            ..none
        });
        let bits = |frame: &Vec<u8>, number: u8| {
            frame
                .iter()
                .map(|byte| (byte ^ number).count_ones())
                .sum::<u32>()
        };
        let bits: Vec<_> = (0..200)
            .zip(&spoilt)
            .map(|(number, frame)| bits(frame, number))
            .collect();
        assert!(bits.iter().all(|count| *count <= 1));
        assert!((10..100).contains(&bits.iter().filter(|count| **count == 1).count()));
    }

    #[test]
    fn a_delayed_frame_comes_when_it_is_due_and_not_before() {
        let (one, other) = Pair::new();
        let (faulty, control) = Faulty::new(one, 1);
        control.set(Faults {
            delay: 500,
            ..Faults::default()
        });
        faulty.send(b"out").unwrap();
        other.send(b"in").unwrap();
        assert_eq!(faulty.receive(), None);
        assert_eq!(faulty.pass(1000), Some(1500));
        assert_eq!(faulty.pass(1499), Some(1500));
        assert_eq!((other.receive(), faulty.receive()), (None, None));
        assert_eq!(faulty.pass(1500), None);
        assert_eq!(other.receive().as_deref(), Some(&b"out"[..]));
        assert_eq!(faulty.receive().as_deref(), Some(&b"in"[..]));
    }
}
