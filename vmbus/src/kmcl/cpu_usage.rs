//! How much of the time a channel's processing at DISPATCH has taken, against what it may take
//! (`VmbChannelSetAllowableDpcCpuUsage`, spec kmcl.md 1.7).

/// The window over which the share is taken, in units of 100 ns.
pub(super) const WINDOW: u64 = 100_000;

/// Packets between two looks at the clock.
pub(super) const PACKETS_PER_LOOK: u32 = 8;

/// Time that was used, less what each window that has passed allowed: a window that was
/// overdrawn, by one slow callback perhaps, is paid for by the windows after it.
#[derive(Debug, Default)]
pub(super) struct CpuUsage {
    /// When the current window began; reference time.
    window: u64,
    used: u64,
    /// Up to when time has been counted, while processing runs.
    counted: Option<u64>,
}

impl CpuUsage {
    /// Processing begins or goes on at reference time `now`. Returns whether it has used more than `percent` of the time.
    pub(super) fn is_spent(&mut self, now: u64, percent: u8) -> bool {
        let allowed = WINDOW / 100 * u64::from(percent);
        if let Some(counted) = self.counted {
            self.used = self.used.saturating_add(now.saturating_sub(counted));
        }
        self.counted = Some(now);
        let windows = now.saturating_sub(self.window) / WINDOW;
        self.window = self.window.saturating_add(windows.saturating_mul(WINDOW));
        self.used = self.used.saturating_sub(windows.saturating_mul(allowed));
        self.used >= allowed
    }

    /// Processing ends at `now`.
    pub(super) fn stop(&mut self, now: u64) {
        if let Some(counted) = self.counted.take() {
            self.used = self.used.saturating_add(now.saturating_sub(counted));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_of_each_window_is_allowed() {
        let mut usage = CpuUsage::default();
        let start = 7 * WINDOW;
        assert!(!usage.is_spent(start, 10));
        assert!(!usage.is_spent(start + WINDOW / 10 - 1, 10));
        assert!(usage.is_spent(start + WINDOW / 10, 10));
        usage.stop(start + WINDOW / 10);
        assert!(usage.is_spent(start + WINDOW - 1, 10), "the same window");
        usage.stop(start + WINDOW - 1);
        assert!(!usage.is_spent(start + WINDOW, 10), "the next one");
    }

    #[test]
    fn time_between_batches_is_not_counted() {
        let mut usage = CpuUsage::default();
        for now in (7 * WINDOW..8 * WINDOW).step_by(100) {
            assert!(!usage.is_spent(now, 2));
            usage.stop(now + 1);
        }
    }

    #[test]
    fn one_slow_callback_is_paid_for_by_later_windows() {
        let mut usage = CpuUsage::default();
        let start = 7 * WINDOW;
        assert!(!usage.is_spent(start, 10));
        usage.stop(start + 2 * WINDOW);
        // Two windows' time at a tenth each takes twenty windows in all.
        assert!(usage.is_spent(start + 19 * WINDOW, 10));
        usage.stop(start + 19 * WINDOW);
        assert!(!usage.is_spent(start + 20 * WINDOW, 10));
    }

    #[test]
    fn the_whole_time_is_never_exceeded() {
        let mut usage = CpuUsage::default();
        for now in (0..5 * WINDOW).step_by(777) {
            assert!(!usage.is_spent(now, 100));
        }
    }
}
