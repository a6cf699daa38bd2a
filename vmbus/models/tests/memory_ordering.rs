//! Each question about the memory ordering of the ring and of the dispatcher, asked under all interleavings.

use vmbus_models as models;

/// Declares one test per question.
macro_rules! questions {
    ($($(#[$meta:meta])* $name:ident: $preemptions:literal,)+) => {
        $(
            $(#[$meta])*
            #[test]
            fn $name() {
                models::check($preemptions, models::$name);
            }
        )+
    };
}

questions! {
    a_packet_is_found_or_signalled: 3,
    the_last_packet_is_found_or_signalled: 3,
    room_is_found_or_signalled: 3,
    a_packet_is_read_before_it_is_overwritten: 3,
    a_turn_that_was_asked_for_is_taken: 3,
    a_mark_left_with_a_single_turn_is_handed_on: 3,
    a_completion_restarts_a_starved_delivery: 3,
    one_of_two_completions_restarts_a_starved_delivery: 3,
    a_returned_place_restarts_a_starved_delivery: 3,
    a_deferred_channel_is_served: 3,
}
